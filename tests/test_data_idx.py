"""Damaged IDX files are named."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_files import idx

from reparam.errors import DataError
from reparam.training.data import Batches, load_data

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"


def write_set(folder: Path, train: int = 6, test: int = 4) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / name
        raw = file.read_bytes()
        packed = name.endswith(".gz")
        changed = change(gzip.decompress(raw) if packed else raw)
        file.write_bytes(gzip.compress(changed) if packed else changed)

    return apply


def test_pixels_and_labels_are_the_files(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    data = load_data(str(folder), mean=(0.5,), std=(0.25,))
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    expected = (np.frombuffer(raw, np.uint8).reshape(4, 1, 5, 4).astype(np.float64) / 255 - 0.5) / 0.25
    images, labels = next(Batches(data, data.validation, batch_size=4, shuffle=False).epoch(0))
    assert np.abs(images.numpy() - expected).max() <= 1e-6
    assert labels.tolist() == [0, 1, 2, 0]
    assert (len(data.train), data.targets, data.shape) == (6, 3, (1, 5, 4))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(IMAGES, lambda b: b"\x89PNG" + b[4:]), f"{IMAGES}: not an IDX file"),
        (rewrite(LABELS, lambda b: b[:3]), f"{LABELS}: not an IDX file"),
        (rewrite(IMAGES, lambda b: b[:-1]), rf"{IMAGES}: the header says \[6, 5, 4\], but 119 bytes follow"),
        (rewrite(LABELS, lambda b: idx(np.zeros(9, np.uint8))), "t10k-images.*4 images.*9 labels"),
        (lambda f: (f / IMAGES).write_bytes((f / IMAGES).read_bytes()[:-9]), f"{IMAGES}: cannot be read"),
        (lambda f: (f / IMAGES).write_bytes(b"not gzip"), f"{IMAGES}: cannot be read"),
        (
            rewrite(IMAGES, lambda b: idx(np.ones((6, 5, 5), np.uint8))),
            r"t10k-images.*\[1, 5, 4\], in training .*\[1, 5, 5\]",
        ),
    ],
)
def test_a_damaged_set_names_the_file(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(write_set(tmp_path))
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))
