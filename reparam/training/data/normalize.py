"""Mean and standard deviation of the training inputs, per channel or feature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reparam.errors import DataError
from reparam.training.data.types import Samples

#: so many samples of a set that is read from disk are enough for a mean to three digits
_MEASURED = 4096
_AT_ONCE = 256


def measure(train: Samples, whole: bool, seed: int) -> tuple[tuple[float, ...], tuple[float, ...], list[str]]:
    """Measure the training part.

    Args:
        whole: all samples; otherwise a random selection.
        seed: of the selection.

    Returns:
        mean and std, (C,) each, of pixels in [0, 1] for uint8 images; std is 1 for a constant channel. Notes.

    Raises:
        DataError: a sample cannot be read, or all inputs are equal.
    """
    count = len(train)
    indices = list(range(count))
    notes = []
    if not whole and count > _MEASURED:
        generator = torch.Generator().manual_seed(seed % 2**63)
        indices = sorted(torch.randperm(count, generator=generator)[:_MEASURED].tolist())
        notes.append(f"mean and std: of {_MEASURED} of the {count} training samples, seed {seed}")
    # The sums are of values about this one: of values far from zero, squares would cancel.
    about = torch.zeros(())
    total = square = torch.zeros(())
    number = 0
    for begin in range(0, len(indices), _AT_ONCE):
        values = _by_channel(train.take(indices[begin : begin + _AT_ONCE])[0])
        if not number:
            about = values.mean(dim=1)
            total, square = torch.zeros_like(about), torch.zeros_like(about)
        values = values - about[:, None]
        total += values.sum(dim=1)
        square += (values * values).sum(dim=1)
        number += values.shape[1]
    shift = total / number
    variance = (square / number - shift * shift).clamp(min=0)
    mean, std = (about + shift).tolist(), variance.sqrt().tolist()
    constant = [index for index, value in enumerate(std) if value <= 1e-12 * abs(mean[index])]
    if len(constant) == len(std):
        raise DataError(
            f"inputs cannot be standardized: all are {mean[0]:g} ({train.place(0)} and the rest); take other data, or"
            " turn --no-normalize"
        )
    if constant:
        std = [1.0 if index in constant else value for index, value in enumerate(std)]
        more = f" and {len(constant) - 8} more" if len(constant) > 8 else ""
        notes.append(
            f"inputs {', '.join(map(str, constant[:8]))}{more} are constant: their std is taken as 1"
        )
    return tuple(mean), tuple(std), notes


def given(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std as the user gave them; one value stands for all channels.

    Raises:
        DataError: one of the two is missing, there are not as many values as channels, or std is not above 0.
    """
    if mean is None or std is None:
        raise DataError(
            f"--{'mean' if std is None else 'std'} alone: give --mean and --std together, or neither"
        )
    spread = []
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, channels):
            raise DataError(f"{option}: {len(values)} values for {channels} channels or features")
        if not all(map(math.isfinite, values)) or (option == "--std" and min(values) <= 0):
            raise DataError(
                f"{option} {','.join(map(str, values))}: has to be finite{', above 0' * (option == '--std')}"
            )
        spread.append(tuple(map(float, values)) * (channels if len(values) == 1 else 1))
    return spread[0], spread[1]


def _by_channel(inputs: Tensor) -> Tensor:
    """(C, n) float64."""
    values = inputs.transpose(0, 1).reshape(inputs.shape[1], -1).double()
    return values / 255 if inputs.dtype == torch.uint8 else values
