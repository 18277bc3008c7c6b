"""A validation part drawn from a dataset that has none of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reparam.errors import DataError
from reparam.training.data.types import Samples


@dataclass(frozen=True)
class Subset:
    """Some samples of a split, in the order of ``indices``."""

    samples: Samples
    indices: Sequence[int]

    @property
    def random(self) -> bool:
        """Whether samples may differ from one reading to the next."""
        return bool(getattr(self.samples, "random", False))

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.samples.take([self.indices[i] for i in indices])

    def place(self, index: int) -> str:
        return self.samples.place(self.indices[index])


def split(
    samples: Samples, labels: NDArray[np.int64] | None, share: float, seed: int
) -> tuple[Subset, Subset]:
    """Training and validation parts, both in the order of ``samples``.

    Args:
        labels: (N,), to draw the same share of every class; None draws from all alike.
        share: of the validation part, in (0, 1); rounded to whole samples.
        seed: of the draw.

    Raises:
        DataError: ``share`` is out of range or leaves one of the parts empty.
    """
    if not 0 < share < 1:
        raise DataError(f"--validation {share:g}: a share between 0 and 1")
    count = len(samples)
    wanted = round(share * count)
    if not 0 < wanted < count:
        raise DataError(
            f"--validation {share:g} of {count} samples leaves no sample for {'training' if wanted else 'validation'};"
            " give another share, or more data"
        )
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    if labels is not None:
        order = order[_spread(labels[order])]
    chosen = np.zeros(count, bool)
    chosen[order[:wanted]] = True
    return (
        Subset(samples, np.flatnonzero(~chosen).tolist()),
        Subset(samples, np.flatnonzero(chosen).tolist()),
    )


def _spread(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order in which every beginning holds each class nearly by its share: the k-th of n stands at (k + 1/2)/n."""
    by_class = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    position = np.empty(len(labels))
    position[by_class] = (np.arange(len(labels)) - np.repeat(first, counts) + 0.5) / np.repeat(counts, counts)
    # Stable: classes that tie keep the random order in which they came.
    return np.argsort(position, kind="stable")
