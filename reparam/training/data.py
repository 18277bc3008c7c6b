"""Image classification sets in the IDX format of the MNIST family: four files in a folder, plain or gzip.

    train-images-idx3-ubyte[.gz]    train-labels-idx1-ubyte[.gz]
    t10k-images-idx3-ubyte[.gz]     t10k-labels-idx1-ubyte[.gz]

An IDX file is two zero bytes, an element type (8: unsigned byte), the number of axes, each extent as a
big-endian 32-bit integer, then the elements in C order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reparam.errors import DataError

_UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class Split:
    """Images (N, 1, H, W) float32, standardized, and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, both standardized with ``mean`` and ``std`` of pixels in [0, 1]."""

    train: Split
    test: Split
    mean: float
    std: float

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return 1 + max(int(self.train.labels.max()), int(self.test.labels.max()))


def load_dataset(folder: Path, mean: float | None = None, std: float | None = None) -> Dataset:
    """Read a folder of IDX files.

    Args:
        folder: holds the four files named above.
        mean, std: of the pixels in [0, 1]; those of the training images without.

    Raises:
        DataError: a file is missing, malformed, truncated, empty, or does not match its partner.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (--data takes a folder of IDX files)")
    train_images, train_labels = _split(folder, "train")
    test_images, test_labels = _split(folder, "t10k")
    train_size, test_size = list(train_images.shape[2:]), list(test_images.shape[2:])
    if train_size != test_size:
        raise DataError(f"{folder}: training images are {train_size}, test images {test_size}")
    pixels = train_images.double()
    mean = float(pixels.mean()) if mean is None else mean
    std = float(pixels.std(correction=0)) if std is None else std
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise DataError(
            f"{folder}: images cannot be standardized with mean {mean:g} and standard deviation {std:g}"
        )
    return Dataset(
        Split((train_images - mean) / std, train_labels),
        Split((test_images - mean) / std, test_labels),
        mean,
        std,
    )


def _split(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) float32 in [0, 1] and labels (N,) int64."""
    images_file, images = _read(folder, f"{part}-images-idx3-ubyte", axes=3)
    labels_file, labels = _read(folder, f"{part}-labels-idx1-ubyte", axes=1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_file}: {len(images)} images, but {len(labels)} labels in {labels_file.name}"
        )
    if not images.size:
        raise DataError(f"{images_file}: no images")
    return torch.from_numpy(images.astype(np.float32) / 255)[:, None], torch.from_numpy(
        labels.astype(np.int64)
    )


def _read(folder: Path, name: str, axes: int) -> tuple[Path, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise DataError(f"{folder}: no {name}.gz or {name}")
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    start = 4 + 4 * axes
    if raw[:4] != bytes([0, 0, _UNSIGNED_BYTE, axes]) or len(raw) < start:
        raise DataError(
            f"{file}: not an IDX file of unsigned bytes with {axes} axes (starts with {raw[:4].hex(' ')})"
        )
    shape = tuple(int(extent) for extent in np.frombuffer(raw, ">u4", axes, offset=4))
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{file}: the header says {list(shape)}, but {len(raw) - start} bytes follow")
    return file, np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
