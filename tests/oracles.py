"""References the maps are held against, and the bars they have to keep.

The oracle is 60-digit arithmetic (the vectors of shared/, or mpmath here); float64 loops that share no code with the
product where mpmath would be too slow. Nothing here is compared with itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from mpmath import mp, mpf
from support import SHARED
from torch import Tensor

mp.dps = 60

#: values and gradients in float64, relative to the norm of the vector
FLOAT64 = 1e-12
#: ‖Δw‖/‖w‖ of one row, float32 there and back
FLOAT32_ROW = 2e-7
#: the same where the row is long and its weight not all in its last two coordinates
FLOAT32_LONG_ROW = 1.2e-7
LONG_ROW = 32
#: gradient at float32 angles, relative to the norm of the exact one; 3.1e-8 measured
FLOAT32_GRADIENT = 5e-8
#: half an ulp: r, λ and the norm of a row's angles when rounded once
FLOAT32_ROUNDED = 2.0**-24
#: what little of a 16-bit row may differ where the contract does not promise every bit
NARROW_ROW = 1e-6

#: largest ‖Δw‖/‖w‖ by the type of the weight
ROW_BAR = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32_ROW,
    torch.float16: NARROW_ROW,
    torch.bfloat16: NARROW_ROW,
}
#: smallest ‖w_{i+1:}‖/‖w‖ at which a weight of this type comes back bit for bit, by (type, type of theta)
SMALLEST_SUFFIX = {
    (torch.float16, torch.float32): 2.0**-11,
    (torch.bfloat16, torch.float32): 2.0**-14,
    (torch.float32, torch.float64): 2.0**-27,
    (torch.float16, torch.float64): 2.0**-27,
    (torch.bfloat16, torch.float64): 2.0**-27,
}


def vectors() -> list[dict[str, Any]]:
    """The cases of gmp_vectors.json; none where the file is not there."""
    file = SHARED / "vectors" / "gmp_vectors.json"
    return json.loads(file.read_text(encoding="utf-8"))["cases"] if file.is_file() else []


def floats(values: Sequence[str]) -> Tensor:
    """Decimal or hexadecimal numbers, rounded to float64."""
    return torch.tensor([float.fromhex(v) if "x" in v else float(v) for v in values], dtype=torch.float64)


def exact_angles(row: Sequence[float]) -> list[mpf]:
    """Angles from the equator in 60 digits; ±π/2 for a single coordinate."""
    w = [mpf(x) for x in row]
    if len(w) == 1:
        return [mp.pi / 2 * (-1 if w[0] < 0 else 1)]
    angles = [mp.atan2(w[i], mp.sqrt(mp.fsum(x * x for x in w[i + 1 :]))) for i in range(len(w) - 2)]
    return [*angles, mp.atan2(w[-2], w[-1])]


def exact_direction(angles: Sequence[float], n: int, stored: torch.dtype) -> list[mpf]:
    """u of stored angles in 60 digits, exact zeros as the format has them."""
    right, straight = stored_zeros(stored)
    direction, prefix = [], mpf(1)
    for j, t in enumerate(angles):
        last = n > 1 and j == n - 2
        direction.append(prefix * (mpf(0) if last and abs(t) == straight else mp.sin(mpf(t))))
        prefix *= mpf(0) if abs(t) == right else mp.cos(mpf(t))
    return direction if n == 1 else [*direction, prefix]


def exact_gradient(angles: Sequence[float], grad: Sequence[float], stored: torch.dtype) -> list[mpf]:
    """∂(g·u)/∂t in 60 digits: each derivative a product of its own, so that no cosine is ever divided by."""
    right, straight = stored_zeros(stored)
    m = len(angles)
    cosines = [mpf(0) if abs(t) == right else mp.cos(mpf(t)) for t in angles]
    sines = [mp.sin(mpf(t)) for t in angles]
    if abs(angles[-1]) == straight:
        sines[-1] = mpf(0)
    gradient = []
    for j in range(m):
        total = mpf(0)
        for i in range(j, m + 1):
            term = mpf(grad[i])
            for k in range(min(i, m)):
                term *= -sines[k] if k == j else cosines[k]
            if i < m:
                term *= cosines[i] if i == j else sines[i]
            total += term
        gradient.append(total)
    return gradient


def stored_zeros(stored: torch.dtype) -> tuple[float, float]:
    """π/2 and π as ``stored`` rounds them."""
    return tuple(float(torch.tensor(angle, dtype=stored)) for angle in (math.pi / 2, math.pi))  # type: ignore[return-value]


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """‖Δw‖/‖w‖ of every row; 0 where a row of zeros came back as zeros, infinite where it did not."""
    found, expected = found.double(), expected.double()
    error, norm = (found - expected).norm(dim=1), expected.norm(dim=1)
    return torch.where(error == 0, 0.0, error / norm)


def comes_back_exactly(rows: Tensor, stored: torch.dtype) -> Tensor:
    """Which rows have to come back bit for bit.

    The condition that holds: no nonzero suffix norm ‖w_{i+1:}‖ is below c of ‖w‖, the norm of the *whole* row, and
    where the last coordinate is negative the one before it is zero or not below 2c of ‖w_{n−1:}‖: its angle is then
    near ±π, where a float has half the resolution it has near π/2. DESIGN's wording, each suffix against the one
    before it and nothing about ±π, is not enough: in bfloat16 [1e-5, −1] and
    [17536, −1.2734375, −7.82e-05, −7.16e-09] fulfil it and lose a bit.
    """
    if (rows.dtype, stored) not in SMALLEST_SUFFIX:
        return torch.zeros(len(rows), dtype=torch.bool)
    c = SMALLEST_SUFFIX[rows.dtype, stored]
    w = rows.double()
    suffix = w.flip(1).square().cumsum(1).sqrt().flip(1)
    exact = ((suffix == 0) | (suffix >= c * suffix[:, :1])).all(dim=1)
    if w.shape[1] > 1:
        before = w[:, -2].abs()
        near_straight = (w[:, -1] < 0) & (before > 0) & (before < 2 * c * suffix[:, -2])
        exact &= ~near_straight
    return exact


def assert_came_back(found: Tensor, rows: Tensor, stored: torch.dtype, bar: float | None = None) -> None:
    """What every conversion there and back has to keep, whatever the layer: the conformance of the map.

    Type and shape; exact zeros, none of which may become something; the bar of the row error; every bit where the
    contract promises it.
    """
    assert (found.dtype, found.shape) == (rows.dtype, rows.shape)
    assert not ((rows == 0) & (found != 0)).any(), "an exact zero was lost"
    worst = float(row_errors(found, rows).max()) if len(rows) else 0.0
    assert worst <= (ROW_BAR[rows.dtype] if bar is None else bar), f"row error {worst:.2e}"
    exact = comes_back_exactly(rows, stored)
    assert torch.equal(found[exact], rows[exact]), "not bit for bit"
