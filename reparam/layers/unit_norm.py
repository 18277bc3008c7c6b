"""Unit norm in layers: w = v/(‖v‖ + ε); the scale is another layer's business (references: the unit-norm blog)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reparam.dtypes import torch_dtype
from reparam.kernels.hyperspherical import power_below, row_norms
from reparam.layers.form import Form
from reparam.parameterizations import WeightSpec
from reparam.parameterizations.unit_norm import EPSILON


class UnitNormForm(Form):
    """``weight_v``, the plain weight bit for bit, and ``bias``, divided like it by ‖v‖ + ε.

    A layer made from a plain one computes its pre-activations divided by ‖v‖ + ε of each unit; whoever makes it
    multiplies what consumes them by :meth:`pushed_scale`.
    """

    name = "unit"
    prefix = "Unit"
    wide = frozenset()

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        row_norms(spec.unit.to_rows(weight))  # refuses NaN and Inf
        tensors = {"weight_v": weight.to(torch_dtype(spec.dtype))}
        if bias is not None:
            assert spec.bias_dtype is not None
            scale = self.pushed_scale(tensors["weight_v"], spec).reshape(bias.shape)
            tensors["bias"] = (bias.double() / scale).to(torch_dtype(spec.bias_dtype))
        return tensors

    def weight(
        self, tensors: Mapping[str, Tensor], spec: WeightSpec, dtype: torch.dtype, outside: bool
    ) -> Tensor:
        assert not outside
        v = tensors["weight_v"].to(torch.promote_types(dtype, torch.float32))
        rows = spec.unit.to_rows(v)
        if rows.numel():  # divided by powers of two, squares neither over- nor underflow
            largest = rows.detach().abs().amax(dim=1, keepdim=True)
            scale = power_below(largest).clamp_min(torch.finfo(rows.dtype).tiny)
            rows, epsilon = rows / scale, EPSILON / scale
            rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + epsilon)
        return spec.unit.from_rows(rows, spec.shape).to(dtype)

    def pushed_scale(self, weight_v: Tensor, spec: WeightSpec) -> Tensor:
        """‖v‖ + ε of every unit in float64, shape (units,): by what the consumers of a new layer are multiplied."""
        return row_norms(spec.unit.to_rows(weight_v)) + EPSILON

    def units_scale(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor | None:
        return None
