"""GmP in layers: r·(u(theta)ᵀx + lambda) (Chen & Ge, eq. 5-10), the scale inside or after the activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from reparam.dtypes import torch_dtype
from reparam.kernels.operator import compose_rows
from reparam.layers.form import Form
from reparam.parameterizations import WeightSpec


class GeometricMixin(nn.Module):
    """A module that holds ``r``, ``theta`` and ``lambda_`` of one weight: a layer, or a part of one."""

    r: nn.Parameter
    theta: nn.Parameter
    lambda_: nn.Parameter | None


class GeometricForm(Form):
    """``r`` (units,), ``theta`` (units, max(n − 1, 1)) in radians from the equator, n the fan-in, and ``lambda_``
    shaped like the bias, or ``bias`` where lambda would not be usable.

    For n = 1 the direction is a sign and theta is not trained.
    """

    name = "gmp"
    prefix = "GmP"
    wide = frozenset({"r", "theta", "lambda_"})
    scale = "r"

    def place(self, weight: str, role: str) -> tuple[str | None, str]:
        return (None, role) if weight == "weight" else (weight, role)

    def weight(
        self, tensors: Mapping[str, Tensor], spec: WeightSpec, dtype: torch.dtype, outside: bool
    ) -> Tensor:
        radius = None if outside else tensors["r"]
        rows = compose_rows(radius, tensors["theta"], spec.fan_in, torch_dtype(spec.stored), dtype)
        return spec.unit.from_rows(rows, spec.shape)

    def bias(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, outside: bool) -> Tensor | None:
        if "lambda_" not in tensors:
            return super().bias(tensors, dtype, outside)
        lambda_ = tensors["lambda_"].double()
        return (lambda_ if outside else tensors["r"].double().reshape(lambda_.shape) * lambda_).to(dtype)

    def units_scale(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor | None:
        return tensors["r"]


def scale_units(x: Tensor, scale: Tensor, channel: int) -> Tensor:
    """Multiply every unit of an activation by its scale: the r that stands after φ.

    torch.fx sees one operation. Where autocast made ``x`` narrower than the scale, the result has its dtype.

    Args:
        x: units on the axis ``channel``.
        scale: shape (units,).
        channel: axis of the units, from the end: −1, or before the spatial axes.
    """
    if has_torch_function((x, scale)):
        return handle_torch_function(scale_units, (x, scale), x, scale, channel)
    return x * scale.to(x.dtype).reshape(-1, *(1,) * (-1 - channel))
