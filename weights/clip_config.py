"""What the config beside a CLIP says and its tensors cannot: heads and the GELU; and that it does not contradict them."""

import os
from dataclasses import dataclass
from pathlib import Path

from clip import CLIPImage, CLIPText
from files.tensors import WeightsError
from weights.diffusers import part_files, read_json

SIDES = {"image": "vision", "text": "text"}
HEADS = {"image": 12, "text": 8}  # in transformers, where the config does not say
# What both say: transformers' word, and ours.
SHAPE = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "intermediate_size": "mlp",
    "projection_dim": "projection",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "max_position_embeddings": "context",
    "vocab_size": "vocabulary",
}
GELU = {"quick_gelu": True, "gelu": False}


@dataclass(frozen=True)
class Config:
    """Of one tower, in transformers' words."""

    path: Path
    values: dict

    @property
    def quick_gelu(self) -> bool:
        kind = self.values.get("hidden_act", "quick_gelu")
        if not isinstance(kind, str) or kind not in GELU:
            raise WeightsError(f"{self.path}: the hidden_act is {kind!r}; {' and '.join(GELU)} are supported")
        return GELU[kind]

    @property
    def heads(self) -> int:
        heads = self.values["num_attention_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise WeightsError(f"{self.path}: num_attention_heads is {heads!r}; a whole number is wanted")
        return heads

    def check(self, tower: CLIPImage | CLIPText) -> None:
        """Refuse a config that is not the tensors'."""
        for said, ours in SHAPE.items():
            found = getattr(tower.config, ours, None)  # None: of the other tower, or it has no projection
            if said in self.values and found is not None and self.values[said] != found:
                raise WeightsError(
                    f"{self.path}: {said} is {self.values[said]!r}, but the tensors beside it have {found}"
                )
        self.check_eps()

    def check_eps(self) -> None:
        if self.values.get("layer_norm_eps", 1e-5) != 1e-5:
            raise WeightsError(f"{self.path}: layer_norm_eps is {self.values['layer_norm_eps']!r}; 1e-05 is supported")


def read_config(path: str | Path, side: str) -> Config | None:
    """What is said beside a file of weights, or in its folder, of a CLIP's tower ("image" or "text").

    `config.json` is transformers', of one tower or of both; `open_clip_config.json` OpenCLIP's. None: nothing is said, or
    of another kind of model.

    Raises:
        WeightsError: not readable.
    """
    folder = part_files(path)[0].parent if os.path.isdir(path) else Path(path).parent
    for name, values_of in (("config.json", transformers_values), ("open_clip_config.json", open_clip_values)):
        if (folder / name).is_file() and (values := values_of(read_json(folder / name), side)):
            return Config(folder / name, {"num_attention_heads": HEADS[side]} | values)
    return None


def transformers_values(config: dict, side: str) -> dict | None:
    kind, name = config.get("model_type"), f"{SIDES[side]}_config"
    if kind == "clip" and isinstance(config.get(name), dict):
        shared = {key: config[key] for key in ("projection_dim",) if key in config}  # it is this one that counts
        return config[name] | shared
    return config if kind == f"clip_{SIDES[side]}_model" else None


def open_clip_values(config: dict, side: str) -> dict | None:
    model = config.get("model_cfg")
    tower = model.get(f"{SIDES[side]}_cfg") if isinstance(model, dict) else None
    if not isinstance(tower, dict) or not isinstance(tower.get("layers"), int):  # a tower of timm or of transformers
        return None
    words = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "patch_size": "patch_size",
        "image_size": "image_size",
    }
    words |= {"context_length": "max_position_embeddings", "vocab_size": "vocab_size", "heads": "num_attention_heads"}
    values = {word: tower[key] for key, word in words.items() if key in tower}
    if side == "image":
        width, head_width = tower.get("width"), tower.get("head_width", 64)
        fits = isinstance(width, int) and isinstance(head_width, int) and head_width > 0
        values["num_attention_heads"] = width // head_width if fits else None
    values["hidden_act"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return values | ({"projection_dim": model["embed_dim"]} if "embed_dim" in model else {})
