"""What training reads from any dataset: samples by index, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Samples(Protocol):
    """A split: inputs with their targets, by index, as they are stored."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Raw inputs and targets of these samples, stacked.

        Returns:
            inputs: images uint8 (N, C, H, W), arrays float32 or int64 (N, ...).
            targets: labels int64 (N,), or values float32 (N, K).

        Raises:
            DataError: a sample cannot be read; the message names its place.
        """
        ...

    def place(self, index: int) -> str:
        """Where a sample lies, for messages: "train/cat/7.png", "set.csv: line 12"."""
        ...


@dataclass(frozen=True)
class Data:
    """A dataset, ready for training.

    Attributes:
        train, validation: neither is empty.
        task: "classify" or "regress".
        classes: names in label order; () for regression.
        targets: number of classes, or width K of the regression target.
        shape: of one network input: (C, H, W), (F,) or whatever the arrays have behind their first axis.
        mean, std: per channel or feature (axis 0 of ``shape``); of pixels in [0, 1] for uint8 images, in the inputs' own
            units otherwise. () = pixels are only scaled to [0, 1], all else is taken as it is.
        notes: what the user should know, a line each: "validation: 10 % of the training part, seed 0".
    """

    train: Samples
    validation: Samples
    task: str
    classes: tuple[str, ...]
    targets: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]
