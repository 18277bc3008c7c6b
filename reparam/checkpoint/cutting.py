"""Cutting a layer into blocks that fit memory: which part of each of its tensors belongs to a block.

| laid out | tensors | a block has |
|---|---|---|
| like the weight | weight, weight_v, weight_g | ``rows`` of the first axis, ``columns`` of the unit axis; all of an axis of extent 1 |
| one row a unit | r, theta, lambda_, bias | ``units`` |

A block of whole units is some groups of the first axis or, where one group is too large, some columns of it; units on
the first axis are groups of one row and one column. A block of rows cuts *across* units that lie on another axis: what
has one row a unit cannot be cut with it, and goes with the first of such blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reparam.parameterizations import UnitAxis, WeightSpec

#: first, and one past the last
Range = tuple[int, int]
#: a shape in which to look at a tensor, and a range on each of its axes
Part = tuple[tuple[int, ...], tuple[Range, ...]]

_BY_UNIT = frozenset({"r", "theta", "lambda_", "bias"})


@dataclass(frozen=True)
class Block:
    """A part of a layer, itself a layer.

    Attributes:
        shape, unit: of the whole layer's weight.
        rows, columns: of the weight.
        units: of the tensors with one row a unit; None if no part of them goes with this block.
        across: units on another axis are cut through: the block is a layer with units on its first axis instead.
    """

    shape: tuple[int, ...]
    unit: UnitAxis
    rows: Range
    columns: Range
    units: Range | None
    across: bool = False

    @classmethod
    def whole(cls, spec: WeightSpec) -> Block:
        """All of a layer."""
        width = spec.shape[spec.unit.axis] if spec.unit.axis else 1
        return cls(spec.shape, spec.unit, (0, spec.shape[0]), (0, width), (0, spec.units))

    @property
    def box(self) -> tuple[Range, ...]:
        """This part of the weight, axis by axis."""
        return self.ranges(self.shape)

    @property
    def extents(self) -> tuple[int, ...]:
        """Shape of this part of the weight."""
        return tuple(stop - start for start, stop in self.box)

    def of(self, spec: WeightSpec) -> WeightSpec:
        """The spec of this part of the layer; where it has a bias, that has one axis."""
        unit = UnitAxis()
        if self.unit.axis and not self.across:
            unit = UnitAxis(self.unit.axis, max(1, (self.rows[1] - self.rows[0]) // self._share))
        bias = None if self.units is None or spec.bias_shape is None else (self.units[1] - self.units[0],)
        return replace(spec, shape=self.extents, unit=unit, bias_shape=bias)

    def part(self, role: str, shape: tuple[int, ...]) -> Part | None:
        """What of one of the layer's tensors belongs to this block: None if nothing does.

        Args:
            role: of the tensor.
            shape: of the whole tensor.
        """
        if role not in _BY_UNIT:
            return shape, self.ranges(shape)
        if self.units is None:
            return None
        if role == "theta":
            return shape, (self.units, (0, shape[1]))
        return (math.prod(shape),), (self.units,)

    def by_units(self, size: int) -> list[Block]:
        """Blocks of whole units of about ``size`` weights, in order."""
        return [part for block in self.by_groups(size) for part in block._by_columns(size)]

    def by_groups(self, size: int) -> list[Block]:
        """Blocks of whole groups of about ``size`` weights, but at least one group, in order."""
        weights, share, width = math.prod(self.extents), self._share, self._width
        if self.columns != (0, width) or not weights:
            return [self]
        first, last = self.rows[0] // share, self.rows[1] // share
        step = max(1, size * (last - first) // weights)
        return [
            replace(self, rows=(a * share, b * share), units=(a * width, b * width))
            for a, b in _steps((first, last), step)
        ]

    def by_rows(self, size: int) -> list[Block]:
        """Blocks of rows of about ``size`` weights, in order."""
        if not self.unit.axis or not math.prod(self.extents):
            return self.by_groups(size)
        step = max(1, size * (self.rows[1] - self.rows[0]) // math.prod(self.extents))
        return [
            replace(self, rows=rows, units=self.units if rows[0] == self.rows[0] else None, across=True)
            for rows in _steps(self.rows, step)
        ]

    def _by_columns(self, size: int) -> list[Block]:
        weights, (start, stop) = math.prod(self.extents), self.columns
        if weights <= size or self.units is None:
            return [self]
        offset = self.units[0] - start
        return [
            replace(self, columns=(a, b), units=(offset + a, offset + b))
            for a, b in _steps(self.columns, max(1, size * (stop - start) // weights))
        ]

    @property
    def _width(self) -> int:
        """Units of one group."""
        return self.shape[self.unit.axis] if self.unit.axis else 1

    @property
    def _share(self) -> int:
        """Rows of one group."""
        return max(1, self.shape[0] // self.unit.groups) if self.unit.axis else 1

    def ranges(self, shape: tuple[int, ...]) -> tuple[Range, ...]:
        cut = {self.unit.axis: self.columns, 0: self.rows}
        return tuple(
            cut.get(axis, (0, extent)) if extent == self.shape[axis] else (0, extent)
            for axis, extent in enumerate(shape)
        )


def _steps(whole: Range, step: int) -> list[Range]:
    return [(start, min(start + step, whole[1])) for start in range(*whole, step)]


def runs(shape: Sequence[int], box: Sequence[Range]) -> tuple[list[int], int]:
    """Where in a tensor of ``shape`` the elements of a box lie: the first of each contiguous run, and a run's length."""
    cut = [axis for axis, extent in enumerate(shape) if box[axis] != (0, extent)]
    if not cut:
        return [0], math.prod(shape)
    inner = math.prod(shape[cut[-1] + 1 :])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(cut[-1])]
    first, length = box[cut[-1]][0] * inner, (box[cut[-1]][1] - box[cut[-1]][0]) * inner
    outer = itertools.product(*(range(*box[axis]) for axis in range(cut[-1])))
    return [first + sum(i * s for i, s in zip(index, strides, strict=True)) for index in outer], length


def within(box: Sequence[Range], outer: Sequence[Range]) -> tuple[slice, ...]:
    """A box as slices of a tensor that holds an outer one."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True))
