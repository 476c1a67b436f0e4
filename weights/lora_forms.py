"""The forms of a LoRA: what the tensors of one layer, and the settings beside them, say of its change.

The changes themselves are values (`ipadapter/low_rank.py`).
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from files.errors import untrusted
from files.tensors import State, WeightsError
from ipadapter.low_rank import Change, Decomposed, Factors, Hadamard, Kronecker, LowRank, Whole

# What `change_of` raises of tensors that are missing, or of no one shape.
MISFITS = (KeyError, IndexError, RuntimeError, ValueError, ZeroDivisionError)
# Of the regular expressions that peft allows for names: letters, alternatives and a wildcard. One that repeats what
# repeats could take years.
PATTERN = re.compile(r"\^?[\w.-]*(\.\*[\w.-]*)?(\|[\w.-]*)*\$?")

Usual = Callable[[int], float]  # alpha / rank, by the rank, where no alpha is there


def change_of(layer: State, usual: Usual = lambda rank: 1.0) -> dict[str, Change]:
    """What a layer's tensors add to its "weight" and its "bias".

    Args:
        layer: by the names in `lora.TENSORS`.

    Raises:
        MISFITS: tensors that make no form.
    """
    left, changes = dict(layer), {}  # each form takes its own
    if "down" in left or "up" in left:
        changes["weight"] = lora(left, usual)
    elif "hada_w1_a" in left:
        first, second = factors(left, "hada_w1", "hada_t1"), factors(left, "hada_w2", "hada_t2")
        changes["weight"] = Hadamard(first, second, scale(left, first.b.shape[0], usual))
    elif any(key.startswith("lokr_") for key in left):
        changes["weight"] = kronecker(left, usual)
    if "dora_scale" in left or "rows" in left:
        rows = left.pop("rows", None)
        lengths = left.pop("dora_scale", None) if rows is None else rows.flatten()
        changes["weight"] = Decomposed(changes["weight"], lengths)
    for key, name in (("diff", "weight"), ("diff_b", "bias")):
        if key in left:
            if name in changes:
                raise ValueError(f"{key} beside another change")
            changes[name] = Whole(left.pop(key))
            left.pop("alpha", None)
    for change in changes.values():
        _ = change.shape  # of what does not fit together there is none
    if left or not changes:
        raise KeyError(*left)
    return changes


def scale(left: State, rank: int, usual: Usual) -> float:
    return left.pop("alpha").item() / rank if "alpha" in left else usual(rank)


def lora(left: State, usual: Usual) -> LowRank:
    down, up = left.pop("down"), left.pop("up")
    if not (down.ndim > 1 < up.ndim and 0 < down.shape[0] == up.shape[1]):
        raise ValueError(f"factors of {tuple(up.shape)} and {tuple(down.shape)}")
    return LowRank(down, up, left.pop("mid", None), scale(left, down.shape[0], usual))


def kronecker(left: State, usual: Usual) -> Kronecker:
    first, second = (
        Whole(left.pop(form)) if form in left else factors(left, form, core)
        for form, core in (("lokr_w1", None), ("lokr_w2", "lokr_t2"))
    )
    low = [matrix.b.shape[0] for matrix in (first, second) if isinstance(matrix, Factors)]
    if not low:  # of two whole matrices alpha says nothing
        left.pop("alpha", None)
    return Kronecker(first, second, scale(left, low[-1], usual) if low else 1.0)


def factors(left: State, form: str, core: str | None) -> Factors:
    a, b, middle = left.pop(f"{form}_a"), left.pop(f"{form}_b"), left.pop(core, None)
    inner = a.shape[0] if middle is not None else a.shape[1]
    if not inner == b.shape[0] > 0:
        raise ValueError(f"{form}: factors of {tuple(a.shape)} and {tuple(b.shape)}")
    return Factors(a, b, middle)


def peft_config(path: Path) -> dict:
    """What diffusers writes into the file, and peft beside it: there alpha is no tensor.

    Raises:
        WeightsError: it cannot be read, or says what no file of peft says.
    """
    text, wrong = None, f"{path}: its LoRA settings are not readable as JSON"
    with suppress(SafetensorError), safe_open(path, "pt") as file:  # a pickle has no metadata
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    with untrusted(WeightsError, wrong):
        if text is None and (beside := path.with_name("adapter_config.json")).is_file():
            text = beside.read_text(encoding="utf-8")
        config = json.loads(text or "{}")
    for key, value in config.items() if isinstance(config, dict) else ():
        fits = True
        if key.endswith("lora_alpha"):
            fits = isinstance(value, int | float)
        elif key.endswith("alpha_pattern"):
            fits = isinstance(value, dict) and all(map(PATTERN.fullmatch, value))
            fits = fits and all(isinstance(alpha, int | float) for alpha in value.values())
        if not fits:
            raise WeightsError(f"{path}: its LoRA settings say that {key} is {value!r}"[:300])
    return config if isinstance(config, dict) else {}


def peft_scale(config: dict, part: str, name: str, rank: int) -> float:
    """alpha / rank by peft's settings; 1 where nothing is said."""
    prefix = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}[part]

    def setting(key: str, default: object) -> object:
        return config.get(prefix + key, config.get(key, default))

    alphas = setting("alpha_pattern", {})
    fitting = (alpha for key, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    alpha = next(fitting, setting("lora_alpha", rank))
    return alpha / (rank**0.5 if setting("use_rslora", False) else rank)
