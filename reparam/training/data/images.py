"""Images decoded by Pillow: all headers read first, pixels when a batch is made.

All images of a dataset become one mode, L (1 channel) or RGB, and one size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reparam.errors import DataError
from reparam.training.data.extra import need
from reparam.training.data.parts import Encoded, Places

#: Pillow's modes of up to 8 bits a channel, and whether they hold grey only
_GREY = dict.fromkeys(("1", "L", "LA", "La"), True)
_MODES = _GREY | dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"), False)
_TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}
# A JPEG decoder can halve an image for little; twice the size asked for is left to the filter, as in Pillow's thumbnail.
_SPARE = 2


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def place(self, index: int) -> str:
        return self.source(index)


@dataclass(frozen=True)
class ImageBytes:
    """Encoded images in memory; ``values`` is a pyarrow binary array."""

    values: Any
    places: Places

    def __len__(self) -> int:
        return len(self.values)

    def source(self, index: int) -> BinaryIO:
        return BytesIO(self.values[index].as_py())

    def place(self, index: int) -> str:
        return self.places.place(index)


@dataclass(frozen=True)
class Images:
    """Images decoded as they are taken.

    Attributes:
        shape: (C, H, W) of every image.
        resize: they are scaled so that they just cover (H, W), and the middle is kept.
    """

    encoded: Encoded
    shape: tuple[int, int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, indices: Sequence[int]) -> Tensor:
        """uint8 (N, C, H, W)."""
        pillow = need("PIL.Image", "decoding images")
        channels, height, width = self.shape
        pixels = np.empty((len(indices), height, width, channels), np.uint8)
        for slot, index in zip(pixels, indices, strict=True):
            slot[...] = self._decode(pillow, index).reshape(slot.shape)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def place(self, index: int) -> str:
        return self.encoded.place(index)

    def _decode(self, pillow: ModuleType, index: int) -> NDArray[np.uint8]:
        channels, height, width = self.shape
        mode = "L" if channels == 1 else "RGB"
        try:
            with pillow.open(self.encoded.source(index)) as image:
                if self.resize:
                    image.draft(None, (_SPARE * width, _SPARE * height))
                # Transparency is dropped; left in place, some conversions would warn of it.
                image.info.pop("transparency", None)
                if image.mode != mode:
                    image = image.convert(mode)
                if self.resize:
                    box = _middle(image.size, (width, height))
                    image = image.resize((width, height), pillow.Resampling.BILINEAR, box=box)
                return np.asarray(image)
        except Exception as error:  # a decoder may raise anything on bad bytes
            raise _bad(self.encoded, index, error) from error


def same_size(parts: Sequence[Encoded], size: int | None) -> tuple[list[Images], list[str]]:
    """Read every header and settle the mode and the size all images get.

    Args:
        parts: of a dataset.
        size: images are resized to ``size`` × ``size``; without, all must be of one size.

    Returns:
        The images of each part, and notes.

    Raises:
        DataError: an image cannot be opened or has more than 8 bits a channel, or sizes differ without ``size``.
    """
    pillow = need("PIL.Image", "decoding images")
    modes: Counter[str] = Counter()
    first: tuple[int, int] | None = None
    for part in parts:
        for index in range(len(part)):
            mode, found = _header(pillow, part, index)
            modes[mode] += 1
            first = first or found
            if size is None and found != first:
                raise DataError(
                    f"images differ in size: {parts[0].place(0)} is {_times(first)}, {part.place(index)} {_times(found)};"
                    " --size N resizes all to N x N"
                )
    assert first is not None
    grey = all(_MODES[mode] for mode in modes)
    notes = []
    if not grey and any(_MODES[mode] for mode in modes):
        count = sum(modes[mode] for mode in modes if _MODES[mode])
        notes.append(f"images: {count} of {modes.total()} are grey; they become RGB like the rest")
    if transparent := sum(modes[mode] for mode in modes if mode in _TRANSPARENT):
        notes.append(f"images: {transparent} have an alpha channel, which is dropped")
    width, height = (size, size) if size else first
    shape = (1 if grey else 3, height, width)
    if size:
        notes.append(f"images: scaled to cover {size}x{size}, the middle kept")
    return [Images(part, shape, resize=bool(size)) for part in parts], notes


def _header(pillow: ModuleType, part: Encoded, index: int) -> tuple[str, tuple[int, int]]:
    """Mode and (width, height)."""
    try:
        with pillow.open(part.source(index)) as image:
            mode, size = image.mode, image.size
    except Exception as error:  # a decoder may raise anything on bad bytes
        raise _bad(part, index, error) from error
    if mode not in _MODES:
        raise DataError(
            f"{part.place(index)}: mode {mode} is not 8 bits a channel; convert it, or leave it out"
        )
    return mode, size


def _bad(part: Encoded, index: int, error: Exception) -> DataError:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    if type(error).__name__ == "UnidentifiedImageError":
        why = "not an image that Pillow knows"
    return DataError(f"{part.place(index)}: cannot be decoded ({why}); mend it or leave it out")


def _middle(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of ``target``'s shape in the middle of an image: left, upper, right, lower."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = target[0] * scale, target[1] * scale
    left, upper = (size[0] - width) / 2, (size[1] - height) / 2
    return left, upper, left + width, upper + height


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
