"""SP, the standard parameterization: ``weight`` and ``bias``, stored as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reparam.dtypes import torch_dtype
from reparam.errors import NonFiniteError
from reparam.parameterizations.base import Parameterization, TensorSpecs, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


class Standard(Parameterization):
    """φ(wᵀx + b): the maps are the identity, ``decompose`` rounds to the layer's own dtype."""

    name = "sp"
    title = "standard parameterization"

    def tensors(self, spec: WeightSpec, bias: str | None) -> TensorSpecs:
        specs: TensorSpecs = {"weight": (spec.dtype, spec.shape)}
        if bias is not None:
            specs["bias"] = spec.bias
        return specs

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        tensors = {"weight": _rounded(weight, spec.dtype)}
        if bias is not None:
            assert spec.bias_dtype is not None
            tensors["bias"] = _rounded(bias, spec.bias_dtype)
        return tensors

    def compose(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        return tensors["weight"], tensors.get("bias")


def _rounded(value: Tensor, dtype: str) -> Tensor:
    """``value`` in ``dtype``; a radius that training let grow may give weights that no float16 holds."""
    rounded = value.to(torch_dtype(dtype))
    if rounded.numel() and not math.isfinite(float(rounded.abs().amax())):
        raise NonFiniteError(f"NaN, Inf, or values beyond {dtype}")
    return rounded
