"""WN in layers: w = g·v/‖v‖ (Salimans & Kingma 2016, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reparam.kernels.weight_norm import compose
from reparam.layers.form import Form
from reparam.parameterizations import WeightSpec
from reparam.parameterizations.weight_norm import norm_axes


class WeightNormForm(Form):
    """``weight_g``, whose axes of extent 1 say over what the norm runs, ``weight_v``, and a plain ``bias``.

    The gradient of v is orthogonal to v: ∇v = g/‖v‖·(I − w·wᵀ/‖w‖²)·∇w.
    """

    name = "wn"
    prefix = "WN"
    wide = frozenset({"weight_g"})
    scale = "weight_g"

    def weight(
        self, tensors: Mapping[str, Tensor], spec: WeightSpec, dtype: torch.dtype, outside: bool
    ) -> Tensor:
        assert not outside
        g = tensors["weight_g"]
        v = tensors["weight_v"].to(g.dtype)
        return compose(g, v, norm_axes(tuple(v.shape), tuple(g.shape))).to(dtype)

    def units_scale(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor | None:
        g = tensors["weight_g"]
        per_unit = spec.unit.axis == 0 and g.dim() > 0 and g.numel() == g.shape[0] == spec.units
        return g.reshape(-1) if per_unit else None
