"""g·v/‖v‖ (Salimans & Kingma 2016, eq. 2) by torch's fused kernel, differentiable as often as one likes.

torch's own ``torch._weight_norm`` is not: it takes the norms for constants where it is differentiated a second time, has no
rule for torch.vmap and none for forward mode. Of a row of zeros it makes NaN; of rows whose squares leave float32, zeros or
NaN. :func:`is_ordinary` says which tensors have no such row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reparam.kernels.hyperspherical import power_below

# Norms from 10⁻⁹ to 10⁹ keep clear of where float32 loses their squares and cubes, about 10∓¹², through any training.
_SMALLEST, _LARGEST = 2.0**-30, 2.0**30
_LARGEST_SCALE = 2.0**60


def fused_axis(g: Tensor, v: Tensor, axes: tuple[int, ...]) -> int | None:
    """The one axis over which the norm does not run, where torch has a fused kernel for it, or None.

    It has one for the first axis and the last, of contiguous float32 and float64 tensors of the CPU and of CUDA.
    """
    kept = [axis for axis in range(v.dim()) if axis not in axes]
    if not kept and v.dim() and v.shape[0] == 1:
        kept = [0]
    alone = len(kept) == 1 and kept[0] in (0, v.dim() - 1) and g.dim() == v.dim() > 1
    fits = (
        v.device.type in ("cpu", "cuda") and v.is_contiguous() and v.dtype in (torch.float32, torch.float64)
    )
    return kept[0] if alone and fits else None


def is_ordinary(g: Tensor, v: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether no norm is zero or far from 1, nor any g: what torch's kernel can take. Waits for the device."""
    if not v.numel():
        return False
    norms = torch.linalg.vector_norm(v.detach(), dim=axes, dtype=torch.promote_types(v.dtype, torch.float32))
    fit = ((norms > _SMALLEST) & (norms < _LARGEST)).all() & (g.detach().abs() < _LARGEST_SCALE).all()
    return bool(fit)


def fused(g: Tensor, v: Tensor, axis: int) -> Tensor:
    """g·v/‖v‖ of what :func:`is_ordinary`, the norm over all axes but ``axis``; all of the same dtype."""
    weight: Tensor = _Fused.apply(v, g.contiguous(), axis)[0]  # type: ignore[no-untyped-call]
    return weight


def composed(g: Tensor, v: Tensor, axes: tuple[int, ...], ordinary: bool = False) -> Tensor:
    """g·v/‖v‖ in torch's operations: zeros for a row of zeros. Of ``ordinary`` ones the compiler makes one kernel."""
    if v.numel() and not ordinary:
        # v/‖v‖ is that of any multiple: squares of this one neither over- nor underflow.
        v = v / power_below(v.detach().abs().amax(dim=axes, keepdim=True))
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    weight: Tensor = v * (g / (norm if ordinary else norm.masked_fill(norm == 0, 1.0)))
    return weight


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(v: Tensor, g: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return torch._weight_norm_interface(v, g, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        v, g, ctx.axis = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(v, g, output[1])
        ctx.save_for_forward(v, g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        v, g, norms = ctx.saved_tensors
        if not torch.is_grad_enabled():
            d_v, d_g = torch.ops.aten._weight_norm_interface_backward(
                grad.contiguous(), v, g, norms, ctx.axis
            )
            return d_v, d_g, None
        u, norm, axes = _direction(v, ctx.axis)
        d_g = (grad * u).sum(axes, keepdim=True)
        return g / norm * (grad - u * d_g), d_g, None

    @staticmethod
    def jvp(ctx: Any, d_v: Tensor | None, d_g: Tensor | None, _: None) -> tuple[Tensor, None]:
        v, g = ctx.saved_tensors
        u, norm, axes = _direction(v, ctx.axis)
        change = torch.zeros_like(v)
        if d_v is not None:
            change = change + g / norm * (d_v - u * (u * d_v).sum(axes, keepdim=True))
        if d_g is not None:
            change = change + u * d_g
        return change, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], v: Tensor, g: Tensor, axis: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        v, g = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((v, g), in_dims[:2], strict=True)
        )
        u, norm, _ = _direction(v, 1 + axis, batched=True)
        return (g * u, norm), (0, 0)


def _direction(v: Tensor, axis: int, batched: bool = False) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """v/‖v‖, the norm, and the axes over which it runs."""
    axes = tuple(i for i in range(int(batched), v.dim()) if i != axis)
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v / norm, norm, axes
