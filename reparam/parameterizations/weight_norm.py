"""WN, weight normalization: w = g·v/‖v‖ (Salimans & Kingma 2016, eq. 2).

The norm runs over the axes on which g has extent 1, whatever ``dim`` torch was given: (out, 1, 1) for the default
dim=0, (1, 1, k) for wav2vec2's positional convolution, () for dim=None. New tensors use dim=0, so that they load strict
into torch's own old and new ``weight_norm``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reparam.dtypes import torch_dtype
from reparam.errors import NonFiniteError
from reparam.parameterizations.base import Parameterization, TensorSpecs, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


class WeightNorm(Parameterization):
    """φ(g·vᵀx/‖v‖ + b); v is the plain weight bit for bit, g its norm. g is learned, like v and b.

    A row of zeros has no direction: it becomes g = 0 with v on the last axis, since torch's own 0·v/‖0‖ is NaN.
    """

    name = "wn"
    title = "weight normalization"
    keeps_dtype = True
    by_row = True

    def tensors(self, spec: WeightSpec, bias: str | None) -> TensorSpecs:
        specs: TensorSpecs = {
            "weight_g": (spec.stored, (spec.shape[0],) + (1,) * (len(spec.shape) - 1)),
            "weight_v": (spec.dtype, spec.shape),
        }
        if bias is not None:
            specs["bias"] = spec.bias
        return specs

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        from reparam.kernels.hyperspherical import row_norms

        v = weight.to(torch_dtype(spec.dtype))
        norms = row_norms(v.reshape(v.shape[0], -1))
        g = norms.to(torch_dtype(spec.stored))
        if g.numel() and not math.isfinite(float(g.amax())):
            raise NonFiniteError("a row's norm does not fit float32 (--theta-dtype float64 holds it)")
        dead = g == 0
        if bool((dead & (norms > 0)).any()):
            raise NonFiniteError("a row whose norm is too small for float32 (--theta-dtype float64 holds it)")
        if bool(dead.any()):
            v = v.clone()
            last: tuple[Tensor | int, ...] = (dead, *(-1,) * (v.dim() - 1))
            v[last] = 1  # not through rows: of other strides, as a pickle may have them, rows are a copy
        shape = (v.shape[0],) + (1,) * (v.dim() - 1)
        tensors = {"weight_g": g.reshape(shape), "weight_v": v}
        if bias is not None:
            assert spec.bias_dtype is not None
            tensors["bias"] = bias.to(torch_dtype(spec.bias_dtype))
        return tensors

    def compose(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        """``tensors`` may hold the ``norm`` that g scales, shaped like g, where this v is a part without all it runs over."""
        import torch

        v = tensors["weight_v"].to(torch.float64, copy=True)
        return v.mul_(_scale(v, tensors)), tensors.get("bias")

    def doubtful(self, plain: Tensor, tensors: Mapping[str, Tensor], bar: float) -> Tensor | None:
        """Rows whose scale g/‖v‖ is farther from 1 than a quarter of an ulp of 1, or whose v is not ``plain`` itself.

        The numbers next to any x round to x up to (1 ± ε/4)·x at least: below a power of two, where they are closest, that
        is the midpoint, and goes to the even x. ε/4 is 2⁻²⁵ in float32; what rounding to float64 adds cannot cross a
        midpoint, which is a float64.
        """
        import torch

        v = tensors["weight_v"]
        near = min(bar, torch.finfo(v.dtype).eps / 4)
        scale = _scale(v.double(), tensors).flatten()
        doubtful = ~((scale - 1).abs() <= near)  # NaN is in doubt
        if v is not plain:
            doubtful |= (v != plain).reshape(len(v), -1).any(1)
        return doubtful


def _scale(v: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """g/‖v‖ in float64, with all axes of ``v``, which is ``weight_v`` in float64."""
    g, norm = tensors["weight_g"].double(), tensors.get("norm")
    if norm is None:
        axes = norm_axes(tuple(v.shape), tuple(g.shape))
        norm = norm_over(v, axes, tensors["weight_v"].dtype.itemsize == 8)
    return (g if g.dim() else g.reshape((1,) * v.dim())) / norm.masked_fill(norm == 0, 1.0)


def norm_over(v: Tensor, axes: tuple[int, ...], wide: bool) -> Tensor:
    """Norm of a float64 tensor over ``axes``, which are kept; squares of what was ``wide`` could over- or underflow."""
    import torch

    from reparam.kernels.hyperspherical import power_below

    if not axes:
        return v.abs()
    scale = power_below(v.abs().amax(dim=axes, keepdim=True)) if wide else None
    norm: Tensor = torch.linalg.vector_norm(v if scale is None else v / scale, dim=axes, keepdim=True)
    return norm if scale is None else norm * scale


def norm_axes(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of v over which the norm runs: those on which g has extent 1; all for a scalar g."""
    if not g_shape:
        return tuple(range(len(v_shape)))
    return tuple(i for i, extent in enumerate(g_shape) if extent == 1)


def is_weight_norm(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> bool:
    """Whether these shapes can be a weight normalization's v and g."""
    if not g_shape:
        return True
    return len(g_shape) == len(v_shape) and all(g in (1, v) for g, v in zip(g_shape, v_shape, strict=True))
