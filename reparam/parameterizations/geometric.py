"""GmP, the geometric parameterization: z = r·φ(u(θ)ᵀx + λ) (Chen & Ge, eq. 5-10).

r = ‖w‖ and λ = b/‖w‖ of one unit, u(θ) the direction of w in hyperspherical coordinates measured from the equator.
The characteristic activation boundary of the unit is {x : u(θ)ᵀx + λ = 0}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reparam.dtypes import torch_dtype
from reparam.parameterizations.base import Parameterization, TensorSpecs, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

#: Beyond this |b|/‖w‖ a boundary is so far from the origin that λ would drown uᵀx: the layer keeps its bias.
LARGEST_LAMBDA = 2.0**20


class Geometric(Parameterization):
    """``r`` (units,), ``theta`` (units, max(fan_in − 1, 1)) in radians, ``lambda_`` shaped like the bias.

    λ is the bias divided by the *stored* r, so that r·λ gives it back. Where that is not usable for some unit (not
    finite, or beyond 2²⁰) the layer keeps ``bias``, and the scale stands inside the activation: φ(r·uᵀx + b).
    """

    name = "gmp"
    title = "geometric parameterization"
    by_unit = True

    def tensors(self, spec: WeightSpec, bias: str | None) -> TensorSpecs:
        specs: TensorSpecs = {
            "r": (spec.stored, (spec.units,)),
            "theta": (spec.stored, (spec.units, max(spec.fan_in - 1, 1))),
        }
        if bias is not None:
            dtype, shape = spec.bias
            specs[bias] = (spec.stored if bias == "lambda_" else dtype, shape)
        return specs

    def bias_role(self, weight: Tensor, bias: Tensor, spec: WeightSpec) -> str:
        from reparam.kernels.hyperspherical import row_norms

        radius = row_norms(spec.unit.to_rows(weight)).to(torch_dtype(spec.stored))
        return "lambda_" if _usable(_lambda(radius, bias), spec.stored) else "bias"

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        from reparam.kernels.backend import for_conversion

        stored = torch_dtype(spec.stored)
        radius, theta = for_conversion().encode(spec.unit.to_rows(weight), stored)
        tensors = {"r": radius, "theta": theta}
        if bias is not None:
            lambda_ = _lambda(radius, bias)
            if bias_role is None:
                bias_role = "lambda_" if _usable(lambda_, spec.stored) else "bias"
            dtype = spec.stored if bias_role == "lambda_" else spec.bias_dtype
            assert dtype is not None
            tensors[bias_role] = (lambda_ if bias_role == "lambda_" else bias).to(torch_dtype(dtype))
        return tensors

    def compose(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        from reparam.kernels.backend import for_conversion
        from reparam.kernels.hyperspherical import right_angle

        theta, radius = tensors["theta"], tensors["r"].reshape(-1)
        stored = torch_dtype(spec.stored)
        if spec.theta_origin == "pole":
            theta = _from_pole(theta.double(), right_angle(stored))
        rows = for_conversion().decode(theta, spec.fan_in, stored, radius)
        bias = tensors.get("bias")
        if "lambda_" in tensors:
            lambda_ = tensors["lambda_"].double()
            bias = lambda_ * radius.double().reshape(lambda_.shape)
        return spec.unit.from_rows(rows, spec.shape), bias


def _lambda(radius: Tensor, bias: Tensor) -> Tensor:
    """b/r in float64, 0 where both vanish."""
    import torch

    b = bias.double()
    r = radius.double().reshape(b.shape)
    return torch.where((b == 0) & (r == 0), 0.0, b / r)


def _usable(lambda_: Tensor, stored: str) -> bool:
    """Whether every unit has a λ that its type holds to full precision; NaN compares false."""
    import torch

    size = lambda_.abs()
    smallest = torch.finfo(torch_dtype(stored)).tiny
    return bool(((size == 0) | ((size >= smallest) & (size <= LARGEST_LAMBDA))).all())


def _from_pole(colatitude: Tensor, right: float) -> Tensor:
    """t = π/2 − θ; whole multiples of the stored right angle map onto one another, so that exact zeros stay exact."""
    import torch

    exact = torch.remainder(colatitude, right) == 0
    return torch.where(exact, right - colatitude, math.pi / 2 - colatitude)
