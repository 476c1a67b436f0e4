"""How a picture becomes what CLIP sees: cropped, padded, squashed, or as squares that act where they lie."""

import numpy as np
import pytest
import torch
from PIL import Image

from clip import FRAMINGS, POSITIONS, preprocess
from clip.preprocess import MEAN, STD
from files.errors import UserError
from generate.framing import MOST, check_framing, tiles
from ipadapter.attention import mask_per_query


def drawn(width: int, height: int) -> Image.Image:
    """Smooth, and different everywhere: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def by_hand(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("size", [(90, 64), (64, 91), (64, 64), (4200, 60)])
def test_a_position_is_a_square_of_the_resized_picture(size):
    """Also of a strip, of which only that square is made."""
    image = drawn(*size)
    whole = image.resize([32 * side // min(size) for side in size], Image.Resampling.BICUBIC)
    spare = [side - 32 for side in whole.size]
    for position in POSITIONS:
        x = 0 if "left" in position else spare[0] if "right" in position else spare[0] // 2
        y = 0 if "top" in position else spare[1] if "bottom" in position else spare[1] // 2
        wanted = by_hand(whole.crop((x, y, x + 32, y + 32)))
        found = preprocess(image, 32, "crop", position)
        assert (found - wanted).abs().max() < 0.02
        assert max(size) > 1000 or torch.equal(found, wanted)
    assert torch.equal(preprocess(image, 32), preprocess(image, 32, "crop", "centre"))


def test_padding_shows_all_of_the_picture_and_zeros_beside_it():
    image = drawn(64, 40)
    small = by_hand(image.resize((32, 20), Image.Resampling.BICUBIC))
    for position, top in {"centre": 6, "top": 0, "bottom": 12, "left": 6, "bottom-right": 12}.items():
        found = preprocess(image, 32, "pad", position)
        assert torch.equal(found[:, :, top : top + 20], small)
        assert not found[:, :, :top].any() and not found[:, :, top + 20 :].any()
    assert preprocess(Image.new("RGB", (9000, 2)), 32, "pad").count_nonzero() == 3 * 32  # one row of a strip is left


def test_squashing_takes_no_heed_of_the_aspect():
    image = drawn(64, 40)
    assert torch.equal(preprocess(image, 32, "squash"), by_hand(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_a_square_is_the_same_in_every_framing():
    image = drawn(50, 50)
    (only,) = tiles(image)
    assert len({preprocess(image, 32, framing).numpy().tobytes() for framing in FRAMINGS}) == 1
    assert torch.equal(by_hand(only[0]), by_hand(image)) and torch.equal(only[1], torch.ones_like(only[1]))


@pytest.mark.parametrize(("size", "count"), [((100, 50), 2), ((50, 120), 3), ((101, 50), 3), ((400, 50), 8)])
def test_tiles_cover_the_picture_and_their_masks_sum_to_one(size, count):
    image = drawn(*size)
    found = tiles(image)
    assert len(found) == count and all(square.size == (50, 50) for square, _ in found)
    first, last = np.asarray(found[0][0]), np.asarray(found[-1][0])
    assert (first == np.asarray(image)[:50, :50]).all() and (last == np.asarray(image)[-50:, -50:]).all()
    masks = torch.cat([mask for _, mask in found])
    assert masks.min() >= 0 and torch.allclose(masks.sum(0), torch.ones(1), atol=1e-6)
    for grid in ((8, 8), (5, 12)):
        assert torch.allclose(sum(mask_per_query(mask, grid) for _, mask in found), torch.ones(1), atol=1e-5)


def test_each_tile_acts_where_it_lies():
    left, right = (mask_per_query(mask, (2, 4)).view(2, 4) for _, mask in tiles(drawn(100, 50)))
    assert torch.equal(left, torch.tensor([[1.0, 1, 0, 0]] * 2)) and torch.equal(right, 1 - left)
    upper, lower = (mask_per_query(mask, (4, 2)).view(4, 2) for _, mask in tiles(drawn(50, 75)))
    assert upper[0, 0] == 1 and upper[3, 0] == 0  # the squares share the middle third, over which one fades
    assert torch.allclose(upper[1:3, 0], torch.tensor([0.875, 0.125]), atol=1e-3)
    assert torch.allclose(upper + lower, torch.ones(1))


def test_names_that_are_none_and_positions_that_nothing_asks_for_are_refused():
    for framing, position, message in (
        ("cut", "centre", "`framing`: 'cut' given, one of crop, pad, squash, tile is wanted"),
        ("crop", "middle", "`crop_position`: 'middle' given, one of centre, top"),
        ("squash", "top", "`crop_position` top: `framing` squash takes the whole picture"),
    ):
        with pytest.raises(UserError, match=message):
            check_framing(framing, position)
    with pytest.raises(ValueError, match="'tile'"):
        preprocess(drawn(8, 8), 8, "tile")
    with pytest.raises(UserError, match=f"of 459x51 has 9 squares, at most {MOST}"):
        tiles(drawn(459, 51))
