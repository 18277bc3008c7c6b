"""Random changes to images: each is one the recipe allows, and each allowed one occurs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_files import pictures, stored
from PIL import Image

from reparam.errors import DataError
from reparam.training.data import Augment
from reparam.training.data.augment import _boxes
from reparam.training.data.randomness import sample_keys

COUNT = 600
KEYS = sample_keys(0, 0, range(COUNT))


def test_half_of_the_images_are_mirrored() -> None:
    images = stored(pictures(COUNT))
    changed = Augment(flip=True)(images, KEYS)
    mirrored = (changed == images.flip(-1)).flatten(1).all(1)
    kept = (changed == images).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert abs(int(mirrored.sum()) - COUNT / 2) < 4 * (COUNT / 4) ** 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_a_window_of_the_padded_image(dtype: torch.dtype) -> None:
    images = (stored(pictures(COUNT, size=(6, 5))) // 2 + 1).to(dtype)
    before = images.clone()
    changed = Augment(crop=2)(images, KEYS)
    assert torch.equal(images, before)
    assert changed.dtype == dtype
    padded = torch.zeros(COUNT, 3, 10, 9, dtype=dtype)
    padded[:, :, 2:-2, 2:-2] = images
    windows = {
        (y, x): (changed == padded[:, :, y : y + 6, x : x + 5]).flatten(1).all(1)
        for y in range(5)
        for x in range(5)
    }
    counts = {place: int(found.sum()) for place, found in windows.items()}
    assert sum(counts.values()) == COUNT  # each is exactly one of them
    assert min(counts.values()) > 24 - 4 * 24**0.5
    assert max(counts.values()) < 24 + 4 * 24**0.5


def test_flip_and_crop_together() -> None:
    images = stored(pictures(COUNT, size=(6, 5))) // 2 + 1
    both = Augment(flip=True, crop=1)(images, KEYS)
    cropped, flipped = Augment(crop=1)(images, KEYS), Augment(flip=True)(images, KEYS)
    mirrored = (flipped != images).flatten(1).any(1)
    assert torch.equal(both, torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped))


def test_a_resized_crop_is_pillows() -> None:
    """Cut out, then scaled by Pillow's bilinear filter: the same to one rounding of the filter's two passes."""
    images = stored(pictures(60, size=(24, 32)))
    changed = Augment(resized_crop=True)(images, KEYS[:60])
    for image, out, (top, left, height, width) in zip(
        images, changed, _boxes(KEYS[:60], 24, 32), strict=True
    ):
        cut = image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        expected = np.asarray(Image.fromarray(cut).resize((32, 24), Image.Resampling.BILINEAR))
        assert np.abs(expected.astype(int) - out.permute(1, 2, 0).numpy()).max() <= 1


def test_the_boxes_are_those_of_the_recipe() -> None:
    """8 to 100 % of the area, 3:4 to 4:3, anywhere: within rounding to whole pixels, over the whole range."""
    keys = sample_keys(0, 0, range(4000))
    top, left, height, width = _boxes(keys, 200, 200).T
    area, ratio = height * width / 200**2, width / height
    assert area.min() > 0.078
    assert area.max() <= 1
    assert area.min() < 0.09
    assert area.max() > 0.95
    assert ratio.min() > 0.73
    assert ratio.max() < 1.37
    assert abs(np.log(ratio).mean()) < 0.01
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == 200
    # Uniform in area where every shape fits, below (3/4) of the image.
    small = area[area < 0.7]
    assert abs(small.mean() - (0.08 + 0.7) / 2) < 0.015
    assert len({tuple(box) for box in _boxes(keys, 200, 200).tolist()}) > 3900


def test_an_image_too_narrow_for_any_box_is_taken_whole() -> None:
    boxes = _boxes(KEYS, 1000, 2)
    assert (boxes[:, 2:] <= [1000, 2]).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes == [0, 0, 1000, 2]).all(axis=1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": -1}, "--crop -1: pixels to pad by"),
        ({"crop": 4, "resized_crop": True}, "two ways to cut; give one"),
    ],
)
def test_what_makes_no_sense(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augment(**options)
    assert not Augment()
