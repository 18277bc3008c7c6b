"""Every kind of layer of DESIGN §2 as a row of cases; a new kind is one line here and gets every test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from support import gaussian
from torch import Tensor, nn

from reparam.dtypes import code_of
from reparam.parameterizations import UnitAxis, WeightSpec


@dataclass(frozen=True)
class Kind:
    """A weight, where its units are, and the bias that belongs to it.

    Attributes:
        key: of the weight in a state_dict.
        shape, axis, groups: of the weight, and its unit axis.
        bias: shape of the bias, None without.
        module: makes the module that computes with it, None where units cannot be told apart by its output.
        sample: shape of one input of the module.
    """

    key: str
    shape: tuple[int, ...]
    axis: int = 0
    groups: int = 1
    bias: tuple[int, ...] | None = None
    module: Callable[[], nn.Module] | None = None
    sample: tuple[int, ...] = ()

    @property
    def unit(self) -> UnitAxis:
        return UnitAxis(self.axis, self.groups)

    def spec(self, dtype: torch.dtype, stored: torch.dtype) -> WeightSpec:
        code = code_of(dtype)
        return WeightSpec(
            self.shape, code, self.unit, self.bias, None if self.bias is None else code, code_of(stored)
        )

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, normal numbers scaled as trained layers are."""
        weight = gaussian(*self.shape, seed=seed, dtype=torch.float32) * 0.1
        bias = None if self.bias is None else gaussian(*self.bias, seed=seed + 1) * 0.1
        return weight.to(dtype), None if bias is None else bias.to(dtype)


KINDS: Mapping[str, Kind] = {
    "linear": Kind("fc.weight", (7, 5), bias=(7,), module=lambda: nn.Linear(5, 7), sample=(3, 5)),
    "linear, no bias": Kind("fc.weight", (7, 40), module=lambda: nn.Linear(40, 7, bias=False), sample=(3, 40)),
    "linear, n=1": Kind("fc.weight", (6, 1), bias=(6,), module=lambda: nn.Linear(1, 6), sample=(3, 1)),
    "linear, n=2": Kind("fc.weight", (6, 2), bias=(6,), module=lambda: nn.Linear(2, 6), sample=(3, 2)),
    "linear, one unit": Kind("fc.weight", (1, 33), bias=(1,), module=lambda: nn.Linear(33, 1), sample=(3, 33)),
    "conv1d": Kind("c.weight", (6, 4, 3), bias=(6,), module=lambda: nn.Conv1d(4, 6, 3), sample=(2, 4, 8)),
    "conv2d": Kind("c.weight", (6, 4, 3, 2), bias=(6,), module=lambda: nn.Conv2d(4, 6, (3, 2)), sample=(2, 4, 6, 6)),
    "conv3d": Kind("c.weight", (4, 3, 2, 3, 2), bias=(4,), module=lambda: nn.Conv3d(3, 4, (2, 3, 2)), sample=(1, 3, 4, 4, 4)),
    "conv2d, grouped": Kind("c.weight", (6, 2, 3, 3), bias=(6,), module=lambda: nn.Conv2d(4, 6, 3, groups=2), sample=(2, 4, 5, 5)),
    "conv2d, depthwise": Kind("c.weight", (8, 1, 3, 3), bias=(8,), module=lambda: nn.Conv2d(8, 8, 3, groups=8), sample=(2, 8, 5, 5)),
    "conv1x1, depthwise": Kind("c.weight", (8, 1, 1, 1), bias=(8,), module=lambda: nn.Conv2d(8, 8, 1, groups=8), sample=(2, 8, 5, 5)),
    "conv transpose 1d": Kind("u.weight", (6, 4, 3), 1, bias=(4,), module=lambda: nn.ConvTranspose1d(6, 4, 3), sample=(2, 6, 5)),
    "conv transpose 2d": Kind("u.weight", (6, 4, 3, 2), 1, bias=(4,), module=lambda: nn.ConvTranspose2d(6, 4, (3, 2)), sample=(2, 6, 5, 5)),
    "conv transpose 3d": Kind("u.weight", (4, 3, 2, 2, 3), 1, bias=(3,), module=lambda: nn.ConvTranspose3d(4, 3, (2, 2, 3)), sample=(1, 4, 3, 3, 3)),
    "conv transpose 2d, grouped": Kind("u.weight", (6, 2, 3, 3), 1, 3, bias=(6,), module=lambda: nn.ConvTranspose2d(6, 6, 3, groups=3), sample=(2, 6, 5, 5)),
    "conv transpose 1d, depthwise": Kind("u.weight", (4, 1, 5), 1, 4, bias=(4,), module=lambda: nn.ConvTranspose1d(4, 4, 5, groups=4), sample=(2, 4, 5)),
    "hf conv1d": Kind("h.c_attn.weight", (5, 9), 1, bias=(9,)),
    "rnn weight_ih": Kind("rnn.weight_ih_l0", (6, 5), bias=(6,)),
    "gru weight_hh": Kind("gru.weight_hh_l0", (18, 6), bias=(18,)),
    "lstm weight_ih": Kind("lstm.weight_ih_l1_reverse", (24, 12), bias=(24,)),
    "lstm weight_hr": Kind("lstm.weight_hr_l0", (3, 6)),
    "attention in_proj": Kind("attn.in_proj_weight", (24, 8), bias=(24,)),
    "experts (E, out, in)": Kind("mlp.experts.up", (3, 6, 5), 1, 3, bias=(3, 6)),
    "experts (E, in, out)": Kind("mlp.experts.down", (3, 5, 6), 2, 3, bias=(3, 6)),
}  # fmt: skip


def rows_by_loops(weight: Tensor, axis: int, groups: int) -> Tensor:
    """The matrix of one row a unit, element by element in memory order: what UnitAxis.to_rows has to give."""
    shape = tuple(weight.shape)
    share = shape[0] // groups
    rows: dict[tuple[int, int], list[float]] = {}
    for block in range(groups):
        for unit in range(shape[axis]):
            rows[block, unit] = []
    for index in itertools.product(*map(range, shape)):
        block = 0 if axis == 0 else index[0] // share
        rows[block, index[axis]].append(weight[index].item())
    return torch.tensor(list(rows.values()), dtype=weight.dtype)
