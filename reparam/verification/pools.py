"""The errors of one output over many inputs, and the rule that judges them.

With y the original in float64, f the original at the deployed dtype and d the deployed file, every error is taken as a
share of the scale of y among the inputs of one group, so that loud inputs do not hide quiet ones:

    max |d − y| ≤ 10 · max(max |f − y|, 2⁻²⁴)        rms (d − y) ≤ 4 · max(rms (f − y), 2⁻²⁴)

or, where the user says what is near enough, |d − y| ≤ atol + rtol·|y|.

f and d are of one run on each input. Where an output fails the rule so, the original's error of one run may have been small
by chance: f − y is taken at inputs next to the given ones too (:mod:`~reparam.verification.own_error`), its largest and its
rms over all of them, as shares of the scale that y has there, and the rule is applied to that once more, for good. The
file's errors stay those of one run.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reparam.verification.report import Check

MAX_FACTOR = 10.0
RMS_FACTOR = 4.0
#: Half an ulp of float32: an original that happens to be exact does not ask for an exact file.
FLOOR = 2.0**-24
_TINY = 2.0**-126  # scale of an output that is zero everywhere


@dataclass(frozen=True)
class Tolerance:
    """|d − y| ≤ atol + rtol·|y| instead of the derived rule."""

    rtol: float = 0.0
    atol: float = 0.0


@dataclass
class _Errors:
    """Errors of runs on the inputs of one group.

    Attributes:
        largest: of them all.
        scale: the largest of y beside them.
        power: sum of their squares.
        exact: the same of y.
        runs: how many.
    """

    largest: float = 0.0
    scale: float = 0.0
    power: float = 0.0
    exact: float = 0.0
    runs: int = 0

    def add(self, error: Tensor, y: Tensor) -> None:
        self.largest = max(self.largest, float(error.max()))
        self.scale = max(self.scale, float(y.abs().max()))
        self.power += float(error.square().sum())
        self.exact += float(y.square().sum())
        self.runs += 1

    @property
    def largest_share(self) -> float:
        """The largest error as a share of the scale of y."""
        return self.largest / max(self.scale, _TINY)

    @property
    def mean_square(self) -> float:
        """As a share of that of y."""
        return self.power / max(self.exact, _TINY**2)


@dataclass
class _Group:
    """``own`` is f − y, ``file`` is d − y and largest ``where``."""

    own: _Errors = field(default_factory=_Errors)
    file: _Errors = field(default_factory=_Errors)
    where: str = ""


@dataclass(eq=False)
class Pool:
    """The errors of one output, kept as sums: outputs of any size in the memory of one.

    Attributes:
        name: of the output.
        tolerance: the user's, None for the derived rule.
        forgiven: integers and truth values that differ where the original is not sure of them.
        values: how many were compared, by group.
        sizes: the extents at which it was compared, by dynamic axis.
    """

    name: str
    tolerance: Tolerance | None = None
    groups: dict[str, _Group] = field(default_factory=dict)
    floating: bool = True
    forgiven: int = 0
    excess: float = -math.inf
    values: Counter[str] = field(default_factory=Counter)
    sizes: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def count(self, group: str, sizes: Mapping[str, int], values: int) -> None:
        """Note that so many values of one input were compared, and its extents."""
        self.values[group] += values
        for axis, extent in sizes.items():
            self.sizes[axis].add(extent)

    def add(self, group: str, where: str, y: Tensor, f: Tensor, got: Tensor) -> None:
        """Add a floating output of one input: three tensors of one shape."""
        if not y.numel():
            return
        errors = self.groups.setdefault(group, _Group())
        own, file = (f.double() - y).abs(), (got.double() - y).abs()
        if self.tolerance is not None:
            allowed = self.tolerance.atol + self.tolerance.rtol * y.abs()
            self.excess = max(self.excess, float((file - allowed).max()))
        if float(file.max()) >= errors.file.largest:
            index = [int(i) for i in np.unravel_index(int(file.argmax()), tuple(file.shape))]
            errors.where = f"output {self.name}{index}, {where}"
        errors.own.add(own, y)
        errors.file.add(file, y)

    def add_own(self, group: str, y: Tensor, f: Tensor) -> None:
        """Add the original at an input next to one that was added, where both are finite: tensors of one shape."""
        if y.numel() and f.shape == y.shape and bool(torch.isfinite(y).all() and torch.isfinite(f).all()):
            self.groups[group].own.add((f.double() - y).abs(), y)

    @property
    def doubted(self) -> bool:
        """Whether the output fails the derived rule."""
        return self.tolerance is None and not all(check.passed for check in self.checks() if check.tolerance)

    def checks(self) -> tuple[Check, ...]:
        """The verdict over everything that was added."""
        if not self.floating:
            told = f"output {self.name}"
            if self.forgiven:
                told += f": {self.forgiven} values differ where the original cannot tell them apart either"
            return (Check("equal", True, where=told),)
        if not self.groups:
            told = f"output {self.name} was always empty, or the original overflowed: nothing was compared"
            return (Check("compared", False, where=told),)
        groups = list(self.groups.values())
        worst = max(groups, key=lambda g: g.file.largest_share)
        largest = max(g.file.largest for g in groups)
        file_max = worst.file.largest_share
        if self.tolerance is not None:
            told = f"{worst.where}, rtol {self.tolerance.rtol:g}, atol {self.tolerance.atol:g}"
            return (Check("within rtol and atol", self.excess <= 0, largest, file_max, where=told),)
        runs = sum(g.own.runs for g in groups)
        more = runs if runs > sum(g.file.runs for g in groups) else None
        return (
            _judge(
                "largest error", MAX_FACTOR, largest, worst.where, file_max,
                max(g.own.largest_share for g in groups), more,
            ),
            _judge(
                "rms error", RMS_FACTOR, largest, f"output {self.name}",
                math.sqrt(sum(g.file.mean_square for g in groups) / len(groups)),
                math.sqrt(sum(g.own.mean_square for g in groups) / len(groups)), more,
            ),
        )  # fmt: skip


def _judge(
    name: str, factor: float, largest: float, where: str, error: float, own: float, runs: int | None
) -> Check:
    noise = max(own, FLOOR)
    return Check(name, error <= factor * noise, largest, error, noise, factor * noise, where, runs=runs)
