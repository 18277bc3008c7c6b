"""What a format's reader returns: inputs and labels as the files hold them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: integers, floats or strings, (N,), or floats (N, K)
Labels = NDArray[np.generic]


class Places(Protocol):
    """Where samples lie, for messages."""

    def place(self, index: int) -> str: ...


class Inputs(Places, Protocol):
    """Inputs by index, ready to be stacked."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Tensor:
        """(N, ...): uint8 images (N, C, H, W), float32 or int64 arrays."""
        ...


@runtime_checkable
class Encoded(Places, Protocol):
    """Image files, or their bytes, that are not decoded yet."""

    def __len__(self) -> int: ...

    def source(self, index: int) -> str | BinaryIO:
        """What Pillow opens."""
        ...


@dataclass(frozen=True)
class Part:
    """Samples that belong together.

    Attributes:
        labels: of each sample; integers count from 0 where ``classes`` names them.
        classes: names of the labels 0, 1, ... where the format gives them.
    """

    inputs: Inputs | Encoded
    labels: Labels
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What one path holds; ``validation`` is None where it has no such part."""

    train: Part
    validation: Part | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Rows of a file: "set.csv: line 12".

    Attributes:
        numbers: of the rows, where they are not 0, 1, ...
    """

    file: str
    noun: str = "row"
    numbers: NDArray[np.int64] | None = None

    def place(self, index: int) -> str:
        number = index if self.numbers is None else int(self.numbers[index])
        return f"{self.file}: {self.noun} {number}"


class Shards:
    """Rows of several files, one after the other."""

    def __init__(self, shards: Sequence[tuple[Places, int]]) -> None:
        """``shards``: of each file its places and their number."""
        self._places = [places for places, _ in shards]
        self._ends = list(itertools.accumulate(count for _, count in shards))

    def place(self, index: int) -> str:
        shard = bisect.bisect_right(self._ends, index)
        return self._places[shard].place(index - (self._ends[shard - 1] if shard else 0))


@dataclass(frozen=True)
class Arrays:
    """Inputs that are all in memory, (N, ...)."""

    values: Tensor
    places: Places

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Sequence[int]) -> Tensor:
        return self.values[torch.as_tensor(indices, dtype=torch.int64)]

    def place(self, index: int) -> str:
        return self.places.place(index)
