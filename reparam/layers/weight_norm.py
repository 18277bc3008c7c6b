"""WN in layers: w = g·v/‖v‖ (Salimans & Kingma 2016, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reparam.kernels.weight_norm import composed, fused, fused_axis, is_ordinary
from reparam.layers.form import Form, Held
from reparam.parameterizations import WeightSpec
from reparam.parameterizations.weight_norm import norm_axes


class WeightNormForm(Form):
    """``weight_g``, whose axes of extent 1 say over what the norm runs, ``weight_v``, and a plain ``bias``.

    The gradient of v is orthogonal to v: ∇v = g/‖v‖·(I − w·wᵀ/‖w‖²)·∇w.

    torch's fused kernel composes it, which makes NaN of a row of zeros. Layers that have one when their values are made,
    loaded or cast, or a norm far from 1, are composed by torch's operations, and such a row is zeros. Whoever writes one
    into ``weight_v`` in place calls :meth:`~reparam.layers.Reparameterized.settle`.
    """

    name = "wn"
    prefix = "WN"
    wide = frozenset({"weight_g"})
    scale = "weight_g"

    def ordinary(self, tensors: Mapping[str, Tensor]) -> bool:
        g, v = tensors["weight_g"], tensors["weight_v"]
        # Not of what a mode or a sharding stands for: its values are elsewhere.
        if v.is_meta or not type(g) is type(v) is nn.Parameter:
            return False
        return is_ordinary(g, v, norm_axes(tuple(v.shape), tuple(g.shape)))

    def weight(self, tensors: Mapping[str, Tensor], held: Held, dtype: torch.dtype, outside: bool) -> Tensor:
        assert not outside
        g = tensors["weight_g"]
        v = tensors["weight_v"].to(g.dtype)
        axes = norm_axes(tuple(v.shape), tuple(g.shape))
        axis = fused_axis(g, v, axes) if held.ordinary and not torch.compiler.is_compiling() else None
        weight = composed(g, v, axes, held.ordinary) if axis is None else fused(g, v, axis)
        return weight.to(dtype)

    def units_scale(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor | None:
        g = tensors["weight_g"]
        per_unit = spec.unit.axis == 0 and g.dim() > 0 and g.numel() == g.shape[0] == spec.units
        return g.reshape(-1) if per_unit else None
