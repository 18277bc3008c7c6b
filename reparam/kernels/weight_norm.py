"""g·v/‖v‖ (Salimans & Kingma 2016, eq. 2) by torch's fused kernel, with the rows it cannot take composed otherwise.

It makes NaN of a row of zeros, and zeros or NaN of one whose square leaves float32. Training gets there: weight decay alone
shrinks the row of a unit that never fires. The kernel tells the norms, so such rows are found and composed again. On a CPU
one looks; on a GPU, where looking would wait for the device, a program a row does, and ends there for ordinary ones
(:mod:`~reparam.kernels.triton_weight_norm`).

``torch._weight_norm`` itself is no choice: where it is differentiated twice it takes the norms for constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from reparam.kernels import backend, forward_mode
from reparam.kernels.hyperspherical import power_below

#: Norms within keep clear of where float32 loses their squares and cubes, 10^±12; and g of where CUDA's g·v, which it
#: multiplies first, would leave it.
SMALLEST, LARGEST, LARGEST_SCALE = 2.0**-30, 2.0**30, 2.0**60


def compose(g: Tensor, v: Tensor, axes: tuple[int, ...]) -> Tensor:
    """g·v/‖v‖, differentiable as often as one likes; zeros for a row of zeros.

    Args:
        g: with extent 1 on ``axes``, or a scalar.
        v: of the same dtype, float32 or float64.
        axes: over which the norm runs.
    """
    axis = None if torch.compiler.is_compiling() else fused_axis(g, v, axes)
    if axis is None:
        return composed(g, v, axes)
    weight: Tensor = _Fused.apply(v, g.contiguous(), axis)[0]  # type: ignore[no-untyped-call]
    return weight


def fused_axis(g: Tensor, v: Tensor, axes: tuple[int, ...]) -> int | None:
    """The one axis over which the norm does not run, where the fused kernel can take it, or None.

    It takes the first and the last of contiguous tensors. Left to torch's operations are besides: forward mode (of several
    levels torch drops the outer ones in a function of one's own), traces (which hold no such function), modes, tensors without
    values of their own (fake, sharded) or with none (on which torch's divides by zero), and GPUs without Triton.
    """
    kept = [axis for axis in range(v.dim()) if axis not in axes]
    if not kept and v.dim() and v.shape[0] == 1:
        kept = [0]
    if len(kept) != 1 or kept[0] not in (0, v.dim() - 1) or not g.dim() == v.dim() > 1:
        return None
    plain = all(type(x) in (Tensor, nn.Parameter) for x in (g, v)) and v.is_contiguous() and v.numel() > 0
    tracing = is_in_torch_dispatch_mode() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not plain or tracing or forward_mode.is_active():
        return None
    if _on_triton(v):
        fits = v.dtype == torch.float32 and kept[0] == 0
    else:
        fits = v.device.type == "cpu" and v.dtype in (torch.float32, torch.float64)
    return kept[0] if fits else None


def composed(g: Tensor, v: Tensor, axes: tuple[int, ...]) -> Tensor:
    """:func:`compose` by torch's operations, of which a compiler makes one kernel."""
    v, norm, _ = _near_one(v, axes)
    return v * (g / norm)


def _gradient(grad: Tensor, g: Tensor, v: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of v and g, itself differentiable: g/‖v‖·(∇w − u·(u·∇w)) and u·∇w, where u = v/‖v‖."""
    v, norm, factor = _near_one(v, axes)
    u = v / norm
    d_g = (grad * u).sum(axes, keepdim=True)
    return g / norm * (grad - u * d_g) / factor, d_g


def _near_one(v: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """v over a power of two of its size, that one's norm (1 where it is 0), and the power: no square leaves the range."""
    factor = power_below(v.detach().abs().amax(dim=axes, keepdim=True)) if v.numel() else v.new_ones(())
    v = v / factor
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v, norm.masked_fill(norm == 0, 1.0), factor


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(v: Tensor, g: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        weight, norms = torch._weight_norm_interface(v, g, axis)
        if _on_triton(v):
            from reparam.kernels import triton_weight_norm

            triton_weight_norm.mend_weight(weight, g, v, norms)
        elif (bad := _extraordinary(g, norms)) is not None:
            rows, g, v = (x.movedim(axis, 0) for x in (weight, g, v))
            rows[bad] = composed(g[bad], v[bad], tuple(range(1, v.dim())))
        return weight, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        v, g, ctx.axis = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(v, g, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        v, g, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return *_gradient(grad, g, v, tuple(i for i in range(v.dim()) if i != ctx.axis)), None
        grad = grad.contiguous()
        d_v, d_g = torch.ops.aten._weight_norm_interface_backward(grad, v, g, norms, ctx.axis)
        if _on_triton(v):
            from reparam.kernels import triton_weight_norm

            triton_weight_norm.mend_gradient(d_v, d_g, grad, g, v, norms)
        elif (bad := _extraordinary(g, norms)) is not None:
            grad, g, v, of_v, of_g = (x.movedim(ctx.axis, 0) for x in (grad, g, v, d_v, d_g))
            of_v[bad], of_g[bad] = _gradient(grad[bad], g[bad], v[bad], tuple(range(1, v.dim())))
        return d_v, d_g, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], v: Tensor, g: Tensor, axis: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        v, g = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip((v, g), in_dims[:2], strict=True)
        )
        # Nobody asks for the norms: g has their shape.
        return (composed(g, v, tuple(i for i in range(1, v.dim()) if i != 1 + axis)), g), (0, 0)


def _on_triton(v: Tensor) -> bool:
    return backend.choose(v).name == "triton"


def _extraordinary(g: Tensor, norms: Tensor) -> Tensor | None:
    """Of which rows the fused kernel's results are not to be had, None where all are."""
    bad = ~((norms > SMALLEST) & (norms < LARGEST) & (g.abs() < LARGEST_SCALE)).flatten()
    return bad if bool(bad.any()) else None
