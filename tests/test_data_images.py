"""Image files: grey, transparent and palette ones, other sizes, and files that are none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import CLASSES, PICTURES, class_folders, encoded, everything, pictures, stored, whole
from PIL import Image

from reparam.errors import DataError
from reparam.training.data import load_data
from reparam.training.data.split import Subset


def test_grey_and_transparent_images(tmp_path: Path) -> None:
    """One colour image makes all of them RGB; without one, all stay one channel."""
    folder = class_folders(tmp_path / "set", pictures(channels=1))
    with_alpha = Image.fromarray(pictures(1)[0]).convert("LA")
    with_alpha.save(folder / "cat" / "000.png")
    data = load_data(str(folder))
    assert data.shape == (1, 6, 5)
    assert any("1 have an alpha channel" in note for note in data.notes)
    Image.fromarray(PICTURES[0]).save(folder / "cat" / "000.png")
    data = load_data(str(folder))
    assert data.shape == (3, 6, 5)
    assert any("11 of 12 are grey" in note for note in data.notes)
    images = whole(data)[0]
    assert torch.equal(images[0], stored(PICTURES)[0])
    assert torch.equal(images[1], stored(pictures(channels=1))[3].expand(3, -1, -1))


def test_palette_images(tmp_path: Path) -> None:
    """With transparency given as bytes, which Pillow warns of when it is not dropped."""
    folder = class_folders(tmp_path / "set", PICTURES)
    palette = Image.fromarray(PICTURES[0]).quantize(8)
    palette.save(folder / "cat" / "000.png", transparency=bytes([0, 128, 255]))
    colours = np.asarray(palette.convert("RGB"))
    assert torch.equal(whole(load_data(str(folder)))[0][0], stored(colours[None])[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_resizing_keeps_the_middle(tmp_path: Path, kind: str) -> None:
    """Vertical stripes, whose middle third alone is white: a square cut from the middle of a wide image."""
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = 255
    folder = class_folders(tmp_path / "set", np.stack([wide] * 3), kind)
    (folder / "cat" / "tall.png").write_bytes(encoded(tall))
    with pytest.raises(DataError, match=r"differ in size: \S+000.\w+ is 120x40, \S+tall.png 30x90; --size N"):
        load_data(str(folder))
    data = load_data(str(folder), size=8, validation=0.5, normalize=False)
    assert data.shape == (3, 8, 8)
    for part in (data.train, data.validation):
        inner = everything(part)[0][:, :, 1:-1, 1:-1]
        assert int(inner.min()) >= 250


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_resizing_is_pillows(tmp_path: Path, kind: str) -> None:
    """A square image has no middle to cut, and half its size leaves a JPEG decoder nothing to skip: the values are those of
    Pillow's own filter on the whole image."""
    files = [encoded(image, kind) for image in pictures(3, size=(32, 32))]
    folder = class_folders(tmp_path / "set", pictures(3, size=(32, 32)), kind)
    data = load_data(str(folder), size=16, validation=0.34)
    assert isinstance(data.train, Subset)
    expected = [
        np.asarray(Image.open(io.BytesIO(file)).resize((16, 16), Image.Resampling.BILINEAR)) for file in files
    ]
    assert torch.equal(everything(data.train.samples)[0], stored(np.stack(expected)))


def test_files_that_are_no_images_are_told(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", PICTURES)
    (folder / "cat" / "Thumbs.db").write_bytes(b"")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / "dog" / "deep").mkdir()
    (folder / "dog" / "001.png").rename(folder / "dog" / "deep" / "001.png")
    data = load_data(str(folder))
    assert data.classes == CLASSES
    assert len(data.train) + len(data.validation) == 12
    assert [note for note in data.notes if "left out" in note] == [
        f"{folder}: left out, as no images by their names: 1 files (cat/Thumbs.db)"
    ]
