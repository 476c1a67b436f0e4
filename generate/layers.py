"""In which layers an image prompt is heard: a line of names and weights, as a factor for each cross-attention layer.

    all                                 every layer
    style, layout, style+layout         where a base draws its style, where its layout
    down, middle, up                    a part of the UNet (`mid` too)
    down.block_2=0.3,up.block_0.1=1     blocks and their transformers, each with a weight; of two the later one holds
    ease-in, style-precise, ...         a course over all layers: the weight types of ComfyUI_IPAdapter_plus
    style-and-composition,down.block_2.1=0.5    one of these, but for what is named behind it

What is not named is silent.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from files.errors import UserError
from unet import SD15, SDXL, layer_names
from weights.families import SD1, Family
from weights.families import SDXL as SDXL_FAMILY

# How the weight goes over the layers; t is a transformer's place from input to output, 0 to 1.
EASED: dict[str, Callable[[float], float]] = {
    "ease-in": lambda t: 0.05 + 0.95 * (1 - t),
    "ease-out": lambda t: 0.05 + 0.95 * t,
    "ease-in-out": lambda t: 0.05 + 0.95 * (1 - abs(2 * t - 1)),
    "reverse-in-out": lambda t: 0.05 + 0.95 * abs(2 * t - 1),
}
COURSES = {
    "linear": "all",
    "weak-input": "all,down=0.2",
    "weak-middle": "all,middle=0.2",
    "weak-output": "all,up=0.2",
    "strong-middle": "all,down=0.2,up=0.2",
    "strong-style-and-composition": "all",
}
SD_STYLE = "down.block_0,down.block_1,up.block_1.2,up.block_2,up.block_3"
SD_LAYOUT = "down.block_2.0=0.25,down.block_2.1"
SD_COURSES = COURSES | {
    "style-transfer": SD_STYLE,
    "composition": SD_LAYOUT,
    "strong-style-transfer": "all,down.block_2=0",
    "style-and-composition": f"{SD_STYLE},{SD_LAYOUT}",
    "style-precise": f"{SD_STYLE},{SD_LAYOUT}",
    "composition-precise": "all,down.block_2.0=0.25,middle=0.1,up.block_1.0=0.1,up.block_1.1=0.1",
}
XL_COURSES = COURSES | {
    "style-transfer": "up.block_0.1",
    "composition": "down.block_2.1",
    "strong-style-transfer": "all,down.block_2.1=0",
    "style-and-composition": "down.block_2.1,up.block_0.1",
    "style-precise": "down.block_2.1,up.block_0.1",
    "composition-precise": "all=0.1,down.block_2.1=1,up.block_0.1=1",
}
LAYOUT = "down.block_2", "down.block_2.1"  # of these courses, in SD 1.x and in SDXL


@dataclass(frozen=True)
class Factors:
    """One for each layer, for the image prompt and for its absence.

    In layers that are swapped the absence hears the pictures, and the image prompt nothing: guidance leads away from them.
    """

    factors: tuple[float, ...]
    swapped: frozenset[int] = frozenset()

    @property
    def heard(self) -> tuple[float, ...]:
        return tuple(0.0 if i in self.swapped else factor for i, factor in enumerate(self.factors))


def factors(spec: str, names: Sequence[str], family: Family) -> Factors | None:
    """What a line comes to in a UNet whose layers have these names (`unet.layer_names`); None: 1 everywhere.

    Raises:
        UserError: a name or a weight that is none, with its place in the line; layers that the base lacks.
    """
    if spec == "all":
        return None
    found, swapped = dict.fromkeys(range(len(names)), 0.0), frozenset()
    layout = frozenset(covered(LAYOUT["up.block_0.1" in names], names))
    for part, weight, at in parts(spec):
        meant = meaning(part, names, family)
        if not meant:
            raise refusal(spec, part, at, names)
        found |= {i: factor * weight for i, factor in meant.items()}
        swapped |= {"style-precise": layout, "composition-precise": found.keys() - layout}.get(part, frozenset())
    everywhere = set(found.values()) == {1.0} and not swapped
    return None if everywhere else Factors(tuple(found.values()), swapped)


def meaning(name: str, names: Sequence[str], family: Family) -> dict[int, float]:
    """The factors of the layers that a name stands for, by their numbers."""
    if name in EASED:
        order = list(dict.fromkeys(sorted(names, key=lambda one: ("down", "mid", "up").index(one.split(".")[0]))))
        return {i: EASED[name](order.index(one) / len(order)) for i, one in enumerate(names)}
    courses = XL_COURSES if "up.block_0.1" in names else SD_COURSES
    line = (courses | {"style": family.style, "layout": family.layout}).get(name)
    if line is None:
        return dict.fromkeys(covered(name, names), 1.0)
    return {i: weight for part, weight, _ in parts(line) for i in covered(part, names)}


def parts(spec: str) -> list[tuple[str, float, int]]:
    """(name, weight, the place of its first character, from 1) of each part of a line."""
    found, at = [], 1
    for part in re.split(r"([,+])", spec):
        name, given, weight = part.partition("=")
        if part not in (",", "+"):
            if not name.strip():
                raise UserError(f"`layers` {spec!r}: a name is wanted at character {at}")
            if given and not re.fullmatch(r"\s*-?(\d+\.?\d*|\.\d+)\s*", weight):
                raise UserError(f"`layers` {spec!r}: {weight!r} at character {at + len(name) + 1}, a number is wanted")
            found.append((name.strip(), float(weight) if given else 1.0, at + len(name) - len(name.lstrip())))
        at += len(part)
    return found


def covered(name: str, names: Sequence[str]) -> list[int]:
    """The numbers of the layers that a name means; `up_blocks.0.attentions.1` is `up.block_0.1`."""
    name = re.sub(r"^(down|up)_blocks\.(\d+)(\.attentions(?=\.))?", r"\1.block_\2", name)
    name = "mid" if name in ("middle", "mid_block", "mid_block.attentions.0") else name
    return [i for i, one in enumerate(names) if name == "all" or one == name or one.startswith(f"{name}.")]


def refusal(spec: str, part: str, at: int, names: Sequence[str]) -> UserError:
    blocks = [name.rpartition(".")[0] for name in names]
    known = dict.fromkeys(("all", "style", "layout", "down", "middle", "up", *blocks, *names, *SD_COURSES, *EASED))
    allowed = [name for name in known if name]
    elsewhere = any(covered(part, layer_names(config)) for config in (SD15, SDXL))
    what = "this base has no such layers" if elsewhere else "unknown"
    near = difflib.get_close_matches(part, allowed, n=1)
    hint = f" ({near[0]}?)" if near and not elsewhere else ""
    return UserError(f"`layers` {spec!r}: {part!r} at character {at}: {what}{hint}; there are {', '.join(allowed)}")


def check_layers(spec: str) -> None:
    """Refuse what means nothing in any base. Raises UserError."""
    try:
        factors(spec, layer_names(SD15), SD1)
    except UserError:
        factors(spec, layer_names(SDXL), SDXL_FAMILY)


def read_curve(text: str) -> str | tuple[float, ...]:
    """`constant`, `fade-in`, `fade-out`, or numbers with commas between. Raises UserError, with the place in the text."""
    if text in ("constant", "fade-in", "fade-out"):
        return text
    found, at = [], 1
    for part in text.split(","):
        if not re.fullmatch(r"\s*-?(\d+\.?\d*|\.\d+)\s*", part):
            wanted = "constant, fade-in, fade-out or numbers with commas between are wanted"
            raise UserError(f"`curve` {text!r}: {part!r} at character {at}; {wanted}")
        found.append(float(part))
        at += len(part) + 1
    return tuple(found)
