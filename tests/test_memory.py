"""Less memory: attention in slices where no fused kernel runs, weights that lie in fewer bits than they compute in."""

import copy
from pathlib import Path

import pytest
import torch
from counterparts import rel
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import unet.unet as unet_file
import weights.storage as storage_file
from files.errors import UserError
from files.tensors import read
from ipadapter import Prompt
from unet.unet import attention, fused
from weights import open_base, pages
from weights.fill import fill
from weights.lora import merge, read_lora
from weights.pages import ABSENT, give_back, kinds, whole_pages
from weights.storage import LARGEST, STORAGES, Stored, store

pytestmark = pytest.mark.slow

TINY_BASE = Path(__file__).parents[1] / "tiny/weights/sd-tiny.safetensors"
BOUNDS = {"float16": 3e-3, "bfloat16": 2e-2, "float8": 0.25}  # of a step with random weights, relative L2


@pytest.fixture
def kernel_calls(monkeypatch) -> list[int]:
    """How many scores each call of torch's attention stands for."""
    calls, kernel = [], unet_file.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return kernel(q, k, v)

    monkeypatch.setattr(unet_file, "scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_a_cpu_has_fused_kernels_and_nothing_is_sliced(draw, kernel_calls, dtype, head_dim):
    q, k, v = draw(3, 2, 4, 30, head_dim).to(dtype)
    attention(q, k, v, scores=100)
    assert kernel_calls == [2 * 4 * 30 * 30]


@pytest.mark.parametrize("scores, slices", [(1, 30), (2 * 4 * 50 * 7, 5), (2 * 4 * 50 * 30, 1), (2**27, 1)])
def test_without_a_fused_kernel_the_scores_stay_within_bounds(draw, kernel_calls, scores, slices):
    q, (k, v) = draw(2, 4, 30, 16), draw(2, 2, 4, 50, 16)
    with sdpa_kernel(SDPBackend.MATH):
        assert not fused(q, k, v)
        sliced = attention(q, k, v, scores)
    assert len(kernel_calls) == slices
    assert max(kernel_calls) <= max(scores, 2 * 4 * 50)  # one query at least
    assert rel(sliced, attention(q, k, v)) <= 1e-6


def test_a_device_that_cannot_be_asked_has_no_fused_kernel(draw, monkeypatch):
    def refuse(*inputs: torch.Tensor) -> int:
        raise NotImplementedError("Could not run 'aten::_fused_sdp_choice' with arguments from the 'MPS' backend.")

    q = draw(1, 1, 4, 8)
    assert fused(q, q, q)
    monkeypatch.setattr(torch, "_fused_sdp_choice", refuse)
    assert not fused(q, q, q)


def test_the_unet_gives_the_same_in_slices(unet, draw, monkeypatch):
    x, t, prompt = draw(2, 4, 16, 16), torch.tensor(500), Prompt(draw(2, 77, 64))
    whole = unet(x, t, prompt)
    monkeypatch.setattr(attention, "__defaults__", (2**12,))
    calls, kernel = [], unet_file.scaled_dot_product_attention
    monkeypatch.setattr(unet_file, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or kernel(*qkv))
    with sdpa_kernel(SDPBackend.MATH):
        assert rel(unet(x, t, prompt), whole) <= 1e-5
    assert len(calls) > 16


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with the values that a file of this dtype has, in fp32 and in the layout that loading gives on a CPU."""
    return copy.deepcopy(model).to(dtype).float().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def step(base_adapter):
    """One image-prompted step."""
    generator = torch.Generator().manual_seed(1)
    x, text, tokens = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 64), (2, 4, 64)))

    def run(unet: nn.Module, storage: torch.dtype | None = None) -> torch.Tensor:
        unet, adapter = copy.deepcopy(unet), rounded(base_adapter, torch.float16)
        if storage:
            store(unet, storage, torch.float32)
            store(adapter.ip_adapter, storage, torch.float32)
        return unet(x, torch.tensor(500), Prompt(text, (adapter.prompt(tokens),)))

    return run


def test_weights_of_a_half_precision_file_kept_as_they_are_give_the_same_bits(unet, step):
    unet = rounded(unet, torch.float16)
    assert torch.equal(step(unet, torch.float16), step(unet))


@pytest.mark.parametrize("name", STORAGES)
def test_what_is_lost_stays_within_bounds(unet, step, name):
    lost = rel(step(unet, STORAGES[name]), step(unet))
    assert 1e-5 < lost < BOUNDS[name]


def test_sdxl_too_reads_all_its_weights_through_their_storage(unet_xl, draw):
    """Its proj_in is Linear, and `label_emb` stays as it computes."""
    unet_xl = rounded(unet_xl, torch.bfloat16)
    inputs = draw(2, 4, 8, 8), torch.tensor(500), Prompt(draw(2, 77, 96), vector=draw(2, unet_xl.config.vector_dim))
    stored = store(copy.deepcopy(unet_xl), torch.bfloat16, torch.float32)
    assert torch.equal(stored(*inputs), unet_xl(*inputs))


@pytest.mark.parametrize("name", STORAGES)
def test_large_weights_are_stored_and_the_rest_computes(unet, name):
    stored = store(copy.deepcopy(unet), STORAGES[name], torch.float32)
    low = {key for key, p in stored.named_parameters() if p.dtype == STORAGES[name]}
    assert {p.dtype for key, p in stored.named_parameters() if key not in low} == {torch.float32}
    exempt = [key for key in unet.state_dict() if key.startswith("time_embed.")]
    matrices = {key for key, w in unet.state_dict().items() if w.ndim > 1 and key not in exempt}
    assert low == matrices
    assert next(stored.parameters()).dtype == torch.float32  # what the guidance computes in
    assert list(stored.state_dict()) == list(unet.state_dict())


def test_fp8_rows_fill_the_range_and_small_weights_keep_their_digits():
    """As they are, weights below 1/512 would be one of three numbers, and all below 1/1024 would be 0."""
    layer = nn.Linear(64, 3, bias=False)
    layer.weight.data = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-4], [1], [600]]
    )
    before = layer.weight.data.clone()
    store(layer, torch.float8_e4m3fn, torch.float32)
    assert layer._parameters["weight"].float().abs().amax(1).tolist() == [LARGEST] * 3
    for ours, theirs in zip(layer.weight, before, strict=True):
        assert rel(ours, theirs) < 0.04


def test_a_row_of_zeros_stays_zero():
    layer = nn.Linear(8, 2)
    layer.weight.data[0] = 0
    store(layer, torch.float8_e4m3fn, torch.float32)
    assert torch.equal(layer.weight[0], torch.zeros(8)) and layer.weight[1].abs().min() > 0


def test_a_copy_added_to_is_refused():
    layer = store(nn.Linear(8, 2), torch.float16, torch.float32)
    assert isinstance(layer, Stored) and isinstance(layer, nn.Linear)
    with pytest.raises(TypeError, match="weight"):
        layer.weight += 1


def test_what_is_to_be_taken_out_again_is_not_stored(unet, draw, tmp_path):
    """Nothing is changed by what is refused; merged for good, the weights are those of a file that was merged before."""
    key = "output_blocks.3.1.transformer_blocks.0.attn1.to_q"
    out, width = unet.get_submodule(key).weight.shape
    flat = f"lora_unet_{key.replace('.', '_')}"
    save_file(
        {f"{flat}.lora_down.weight": draw(2, width), f"{flat}.lora_up.weight": draw(out, 2)}, tmp_path / "x.safetensors"
    )
    loras, model = [(read_lora(tmp_path / "x.safetensors"), 0.5)], copy.deepcopy(unet)
    undo = merge(model, loras, "unet")
    merged, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=f"merged into 1 weights .{key}.weight.* `keep` False"):
        store(model, torch.float16, torch.float32)
    assert types == [type(module) for module in model.modules()] and not different(model.state_dict(), merged)
    undo()
    assert not different(model.state_dict(), unet.state_dict())
    merge(model, loras, "unet", keep=False)
    assert not different(model.state_dict(), merged)
    stored = copy.deepcopy(store(model, torch.float16, torch.float32).state_dict())
    wanted = copy.deepcopy(unet)
    wanted.load_state_dict(merged)
    assert not different(stored, store(wanted, torch.float16, torch.float32).state_dict())
    with pytest.raises(RuntimeError, match=f"1 weights .{key}.weight.* are stored in fewer bits"):
        merge(model, loras, "unet")
    assert not different(model.state_dict(), stored)


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The tensors that are not equal bit for bit."""
    return {key for key, w in one.items() if w.dtype != other[key].dtype or not torch.equal(w, other[key])}


def test_a_new_weight_is_used_as_it_is():
    layer = store(nn.Linear(8, 2, bias=False), torch.float8_e4m3fn, torch.float32)
    layer.weight = nn.Parameter(torch.ones(2, 8), requires_grad=False)
    assert torch.equal(layer(torch.ones(1, 8)), torch.full((1, 2), 8.0))


def test_a_new_weight_may_be_trained(draw):
    """Of a convolution the gradient to its weight reads the input, which a stored one does not keep."""
    layer, x = store(nn.Conv2d(4, 4, 3), torch.float32, torch.float32), draw(1, 4, 8, 8).requires_grad_()
    layer.weight = nn.Parameter(draw(4, 4, 3, 3))
    layer(x).square().sum().backward()
    plain, y = nn.Conv2d(4, 4, 3), x.detach().requires_grad_()
    plain.load_state_dict(layer.state_dict())
    plain(y).square().sum().backward()
    assert torch.equal(layer._parameters["weight"].grad, plain.weight.grad) and torch.equal(x.grad, y.grad)


def test_weights_come_to_the_device_that_computes(unet, draw):
    """On `meta`: a weight that stayed behind would be an error there."""
    stored = store(copy.deepcopy(unet), torch.float16, torch.float32, "meta")
    out = stored(draw(1, 4, 8, 8).to("meta"), torch.tensor(500, device="meta"), Prompt(draw(1, 77, 64).to("meta")))
    assert out.shape == (1, 4, 8, 8)
    assert {p.device.type for p in stored.parameters() if p.dtype == torch.float16} == {"cpu"}
    assert {p.device.type for p in stored.parameters() if p.dtype != torch.float16} == {"meta"}


def test_the_tiny_base_loaded_in_half_and_stored_is_the_base_in_full(draw):
    """What a script does: load in fp16, the file's own dtype, store, compute in fp32."""
    full, half = (open_base(TINY_BASE, dtype).unet() for dtype in (torch.float32, torch.float16))
    inputs = draw(1, 4, 16, 16), torch.tensor(500), Prompt(draw(1, 77, full.config.context_dim))
    store(half, torch.float16, torch.float32)
    assert torch.equal(half(*inputs), full(*inputs))
    assert sum(p.nbytes for p in half.parameters()) < 0.53 * sum(p.nbytes for p in full.parameters())


# Pages of mapped files


@pytest.fixture(params=["safetensors", "bin"])
def mapped(request, tmp_path) -> dict[str, torch.Tensor]:
    """fp16, 18 MB each weight; in memory, since it has been read."""
    path = tmp_path / f"weights.{request.param}"
    state = {key: value.half() for key, value in layers().state_dict().items()}
    (save_file if request.param == "safetensors" else torch.save)(state, path)
    found = read(path)
    assert all(torch.equal(found[key], state[key]) for key in state)
    return found


def in_memory(tensor: torch.Tensor) -> float:
    """Which share of its pages."""
    found = kinds(*whole_pages(tensor))
    return 1 - found.count(ABSENT) / len(found)


# A page that is read brings its neighbours along, up to 2 MB in all. Only Linux tells, and gives back.
GONE = 0.3 if Path(pages.PAGEMAP).exists() else 1


def test_pages_of_a_file_go_and_come_back(mapped):
    weight = mapped["0.weight"]
    before = weight.clone()
    assert in_memory(weight) == 1
    middle = weight[500:2500, 20:].mT
    give_back(middle)
    assert in_memory(middle) <= GONE
    assert torch.equal(weight, before)


def test_what_no_file_holds_stays(mapped):
    """A copy, a tensor of a file with one number changed, one shorter than a page, one of nothing."""
    changed = mapped["0.weight"]
    changed[77, 77] = 7
    tensors = [mapped["1.weight"].clone(), changed, mapped["0.bias"][:9], torch.empty(0), torch.tensor(3.0)]
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        give_back(tensor)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def layers(state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(3000, 3000), nn.Linear(3000, 3000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_is_not_held_beside_the_model_that_was_made_of_it(mapped, dtype):
    """Only what the model reads straight from the file stays."""
    model = fill(layers, dict(mapped), "file", dtype, "cpu")
    shares = [in_memory(mapped[key]) for key in ("0.weight", "1.weight")]
    assert max(shares) <= GONE if dtype == torch.float32 else shares == [1, 1]
    assert all(torch.equal(weight, mapped[key].to(dtype)) for key, weight in model.state_dict().items())


def test_a_stored_weight_is_in_memory_while_it_is_used(mapped):
    model, x = store(fill(layers, mapped, "file", torch.half, "cpu"), torch.half, torch.float32), torch.ones(1, 3000)
    out = model(x)
    assert max(in_memory(layer._parameters["weight"]) for layer in model) <= GONE
    assert torch.equal(model(x), out)
    model[0]._parameters["weight"][0] += 1  # from here on it is no longer what the file has
    changed = model(x)
    assert not torch.equal(changed, out)
    assert torch.equal(model(x), changed)


def test_where_nobody_tells_what_pages_are_nothing_is_given_back(mapped, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "PAGEMAP", str(tmp_path / "nothing"))
    give_back(mapped["0.weight"])
    monkeypatch.undo()
    assert in_memory(mapped["0.weight"]) == 1


@pytest.mark.parametrize("name", STORAGES)
def test_on_the_way_back_a_weight_is_brought_up_anew_with_the_same_gradients(unet, draw, monkeypatch, name):
    unet, brought = store(copy.deepcopy(unet), STORAGES[name], torch.float32), []
    monkeypatch.setattr(storage_file, "give_back", brought.append)
    x, text = draw(2, 4, 8, 8), draw(2, 77, 64).requires_grad_()

    def gradient() -> tuple[torch.Tensor, int, int]:
        brought.clear()
        y = unet(x, torch.tensor(500), Prompt(text))
        there = len(brought)
        return *torch.autograd.grad(y.square().mean(), text), there, len(brought) - there

    found, there, back = gradient()
    assert 0 < back <= there
    monkeypatch.setattr(Stored, "forward", lambda self, x: super(Stored, self).forward(x))  # as torch saves them
    wanted, again, held = gradient()
    assert (there, held) == (again, 0) and wanted.abs().max() > 0
    assert torch.equal(found, wanted)
