"""What an operation decided: an index or a truth value, the numbers it was decided by, and how sure it is of it.

argmax(z) = i, the file says j         right as well where  z_i − z_j ≤ 10 · error of z
z > t,         the file says not                        |z − t| ≤ 10 · (error of z + error of t)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reparam.verification.pools import FLOOR


@dataclass(frozen=True)
class Decision:
    """An index or a truth value, and the numbers it was decided by.

    Attributes:
        result: integers or bools.
        left: the numbers; ``right`` those they were compared with, None where the largest or smallest were picked.
        axis: along which they were picked; None for all of the tensor.
    """

    result: Tensor
    left: Tensor
    right: Tensor | float | None = None
    axis: int | None = None

    def margin(self, other: Tensor) -> Tensor:
        """How far the numbers are from deciding ``other`` instead: shape of ``result``, infinite where they cannot."""
        if self.right is not None:
            right = (
                self.right.double() if isinstance(self.right, Tensor) else torch.tensor(self.right).double()
            )
            return _apart(self.left.double(), right).expand(self.result.shape)
        data, axis = self._data()
        got = self._indices(other)
        valid = (got >= 0) & (got < data.shape[axis])
        # Of several picks none is picked twice.
        repeated = (got.sort(axis).values.diff(dim=axis) == 0).any(axis, keepdim=True)
        picked = data.gather(axis, got.clamp(0, data.shape[axis] - 1))
        apart = _apart(self._picked(self.result), picked)
        return torch.where(valid & ~repeated, apart, torch.inf).reshape(self.result.shape)

    def error(self, own: Decision | None) -> float:
        """How far rounding may move the numbers that decided.

        Those that were not picked do not count: a mask's −10⁹ would excuse everything.

        Args:
            own: the same decision at the deployed type. None, or one of other numbers: nothing is excused.
        """
        if own is None or own._shapes() != self._shapes():
            return 0.0
        total = 0.0
        for exact, rounded in zip(self._deciding(self), self._deciding(own), strict=True):
            finite = torch.isfinite(exact) & torch.isfinite(rounded)
            if bool(finite.any()):
                apart = (rounded - exact).abs()[finite]
                total += max(FLOOR * float(exact[finite].abs().max()), float(apart.max()))
        return total

    def _shapes(self) -> list[object]:
        """What kind of decision it is, and of how many numbers."""
        return [self.axis, *(getattr(side, "shape", type(side)) for side in (self.left, self.right))]

    def _deciding(self, at: Decision) -> list[Tensor]:
        """The numbers of ``at`` by which this one was decided."""
        if self.right is None:
            return [at._picked(self.result)]
        return [side.double() for side in (at.left, at.right) if isinstance(side, Tensor)]

    def _picked(self, result: Tensor) -> Tensor:
        data, axis = self._data()
        return data.gather(axis, self._indices(result))

    def _data(self) -> tuple[Tensor, int]:
        data = self.left.double()
        return (data.reshape(-1), 0) if self.axis is None or not data.dim() else (data, self.axis)

    def _indices(self, result: Tensor) -> Tensor:
        """Indices along the axis of the numbers, with that axis."""
        if self.axis is None or not self.left.dim():
            return result.reshape(-1)
        return result if result.dim() == self.left.dim() else result.unsqueeze(self.axis)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Distances; equal infinities are a tie, and from NaN all is infinitely far."""
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
