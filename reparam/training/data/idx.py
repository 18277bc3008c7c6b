"""Image classification sets in the IDX format of the MNIST family: files in one folder, plain or gzip.

    train-images-idx3-ubyte[.gz]    train-labels-idx1-ubyte[.gz]
    t10k-images-idx3-ubyte[.gz]     t10k-labels-idx1-ubyte[.gz]    (validation; may be absent)

An IDX file is two zero bytes, an element type (8: unsigned byte), the number of axes, each extent as a
big-endian 32-bit integer, then the elements in C order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reparam.errors import DataError
from reparam.training.data.parts import Arrays, Part, Rows, Source

_UNSIGNED_BYTE = 8
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def holds_idx(folder: Path) -> bool:
    """Whether a folder has files of such names."""
    return any(_find(folder, part, kind) for part in ("train", "t10k") for kind in (_IMAGES, _LABELS))


def read_idx(folder: Path) -> Source:
    """Read a folder of IDX files.

    Raises:
        DataError: a file is missing, malformed, truncated, empty, or does not match its partner.
    """
    train = _part(folder, "train")
    if not (_find(folder, "t10k", _IMAGES) or _find(folder, "t10k", _LABELS)):
        return Source(train)
    return Source(train, _part(folder, "t10k"), ("validation: the t10k files",))


def _part(folder: Path, part: str) -> Part:
    images_file, images = _read(folder, part, _IMAGES, axes=3)
    labels_file, labels = _read(folder, part, _LABELS, axes=1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_file}: {len(images)} images, but {len(labels)} labels in {labels_file.name}"
        )
    if not images.size:
        raise DataError(f"{images_file}: no images")
    inputs = Arrays(torch.from_numpy(images)[:, None], Rows(str(images_file), "image"))
    return Part(inputs, labels.astype(np.int64))


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The file of this name, also with the dot that some copies have in it: train-images.idx3-ubyte."""
    names = (f"{part}-{kind}", f"{part}-{kind.replace('-', '.', 1)}")
    files = (folder / f"{name}{suffix}" for suffix in (".gz", "") for name in names)
    return next((file for file in files if file.is_file()), None)


def _read(folder: Path, part: str, kind: str, axes: int) -> tuple[Path, NDArray[np.uint8]]:
    file = _find(folder, part, kind)
    if file is None:
        raise DataError(f"{folder}: no {part}-{kind}.gz or {part}-{kind}")
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
    # A copy: torch wants memory it may write to.
    return file, np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()
