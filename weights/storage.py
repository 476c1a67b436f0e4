"""Weights that lie in memory in fewer bits than are computed with: fp16, bf16 or fp8, brought up layer by layer.

Of a UNet nearly all bytes are the matrices of its Linear and Conv2d layers. Only these are lowered; norms, biases,
embeddings and the small layers that tell the timestep stay as they compute. What a mapped file has in this dtype is
read from there at each use, and in memory no longer. A file of fp16 weights kept in fp16 and computed with in fp32 gives
the picture of fp32, bit for bit, in half the memory. (sample.py never holds a weight in more bits than the storage's,
so out of an fp32 file the small ones are rounded to them, too.)
"""

import torch
from torch import Tensor, nn

from files.errors import UserError
from weights.fill import layout
from weights.pages import give_back, give_back_freed

STORAGES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
EXEMPT = ("time_embed.", "label_emb.")  # 0.3 % of the bytes, read by every block of the UNet


class Stored(nn.Module):
    """A Linear or Conv2d whose `weight`, whoever reads it, comes in the dtype and on the device that it computes with.

    Frozen: on the way back of a training it is brought up once more, and not held until then.
    """

    compute: torch.dtype
    device: torch.device | None  # None: where it lies
    row_scale: Tensor | None  # of an fp8 weight: what each row was divided by, (rows, 1) or (rows, 1, 1, 1)
    used: Tensor | None = None  # the weight as it was brought up, while a step of a training computes with it

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or self._parameters["weight"].requires_grad:
            return super().forward(x)
        self.__dict__["used"] = self.weight  # as it is, it may be a parameter, which a module would take for one more
        memory = self.used.untyped_storage().data_ptr()

        def pack(saved: Tensor) -> tuple[bool, tuple]:
            shape = saved.size(), saved.stride()
            weight = saved.untyped_storage().data_ptr() == memory
            return weight, (*shape, saved.storage_offset()) if weight else (*shape, saved.dtype, saved.device)

        def unpack(packed: tuple[bool, tuple]) -> Tensor:
            weight, how = packed
            if weight:
                return self.weight.as_strided(*how)
            size, stride, dtype, device = how  # a convolution's input: beside a frozen weight only its shape is read
            return torch.empty_strided(size, stride, dtype=dtype, device=device)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return super().forward(x)
        finally:
            self.__dict__["used"] = None

    @property
    def weight(self) -> Tensor:
        if self.used is not None:
            return self.used
        stored = self._parameters["weight"]
        weight = stored.to(self.device or stored.device, self.compute)
        give_back(stored)
        return weight * self.row_scale if stored.dtype == torch.float8_e4m3fn else weight


@torch.no_grad()
def store(
    model: nn.Module, storage: torch.dtype, compute: torch.dtype, device: torch.device | str | None = None
) -> nn.Module:
    """Keep a model's large weights in `storage`, compute in `compute`; the model is changed and returned.

    Merge LoRAs first, and for good: a weight reads as a copy, and out of a rounded one nothing can be taken. fp8 (e4m3,
    3 bits of mantissa) is scaled row by row, or weights of 1 / 64 and less would lose those bits too.

    Args:
        device: where to compute, if not where the weights lie: each weight is brought there when it is used, and only
            the small tensors stay there.

    Raises:
        UserError: changes are merged that could be taken out again; then nothing was changed.
    """
    if held := [name for name, p in model.named_parameters() if "merged" in vars(p)]:
        raise UserError(
            f"LoRAs are merged into {len(held)} weights ({held[0]}, ...) such that they can be taken out again, which they "
            "cannot of stored weights: merge them for good, with `keep` False, or take them out first"
        )
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(EXEMPT)
    ]
    for _, layer in layers:
        weight = before = layer._parameters["weight"]
        layer.row_scale = None
        if storage == torch.float8_e4m3fn:
            rows = weight.float()
            layer.row_scale = rows.abs().amax(dim=tuple(range(1, rows.ndim)), keepdim=True).clamp(min=1e-12) / LARGEST
            weight = rows / layer.row_scale
            layer.row_scale = layer.row_scale.to(device, compute)
        weight = weight.to(storage, memory_format=layout(weight, device or weight.device))
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        give_back(before)
        layer.compute, layer.device = compute, device
        layer.__class__ = type(type(layer).__name__, (Stored, type(layer)), {})
    large = {layer._parameters["weight"] for _, layer in layers}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in large:
                    moved = tensor.to(device, compute if tensor.is_floating_point() else None)
                    tensors[name] = nn.Parameter(moved, False) if tensors is module._parameters else moved
    give_back_freed()
    return model
