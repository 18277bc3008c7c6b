"""The map (r, theta) → rows of weights as one operator, which torch.compile and torch.export see as one node.

``torch.ops.reparam.rows`` and its gradient ``torch.ops.reparam.rows_gradient`` run what :mod:`reparam.kernels.backend`
has for the device, or the reference: float64 inside, chunk by chunk, each result rounded. Nothing of the size of
the weight is kept for the backward pass but theta itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reparam.kernels import forward_mode
from reparam.kernels.backend import choose


def compose_rows(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """Rows r·u(theta), differentiable in r and theta once, in forward mode as often as one likes.

    Args:
        radius: shape (rows,), float32 or float64; unit rows without it.
        theta: angles from the equator in radians, shape (rows, max(n − 1, 1)), float32 or float64.
        n: fan-in; theta of width 1 belongs to n = 1 or n = 2.
        stored: dtype theta was stored in, which decides the exact zeros whatever dtype it has by now.
        dtype: of the result.

    Returns:
        Shape (rows, n), rounded from float64 to ``dtype``; to 16 bits by way of float32, as torch does.

    Raises:
        ValueError: theta or r is narrower than float32, which cannot hold an angle.
    """
    for name, tensor in (("r", radius), ("theta", theta)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype}: angles and radii need float32 or float64; keep them out of mixed precision"
            )
    if forward_mode.is_active():
        return forward_mode.decode(theta, n, stored, radius, dtype)
    rows: Tensor = rows_operator(radius, theta, n, stored, dtype)
    return rows


@torch.library.custom_op("reparam::rows", mutates_args=())
def rows_operator(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, dtype: torch.dtype
) -> Tensor:
    return choose(theta).decode(theta, n, stored, radius, dtype)


@torch.library.custom_op("reparam::rows_gradient", mutates_args=())
def rows_gradient_operator(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, grad: Tensor
) -> tuple[Tensor, Tensor]:
    return choose(theta).gradient(radius, theta, n, stored, grad)


@rows_operator.register_fake
def _rows_fake(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, dtype: torch.dtype
) -> Tensor:
    return theta.new_empty((theta.shape[0], n), dtype=dtype)


@rows_gradient_operator.register_fake
def _rows_gradient_fake(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, grad: Tensor
) -> tuple[Tensor, Tensor]:
    return theta.new_empty(theta.shape[0]), theta.new_empty(theta.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    radius, theta, ctx.n, ctx.stored, _ = inputs
    ctx.with_radius = radius is not None
    ctx.save_for_backward(theta, *([radius] if ctx.with_radius else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    theta, *rest = ctx.saved_tensors
    radius = rest[0] if ctx.with_radius else None
    d_radius, d_theta = rows_gradient_operator(radius, theta, ctx.n, ctx.stored, grad)
    return (
        d_radius.to(radius.dtype) if radius is not None and ctx.needs_input_grad[0] else None,
        d_theta if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


rows_operator.register_autograd(_backward, setup_context=_setup)


def _folded(tensor: Tensor | None, axis: int | None, size: int) -> Tensor | None:
    """A tensor of rows with torch.vmap's axis in front of them: rows know nothing of one another."""
    if tensor is None:
        return None
    batch = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return batch.flatten(0, 1)


@rows_operator.register_vmap
def _rows_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    radius: Tensor | None,
    theta: Tensor,
    n: int,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    size = info.batch_size
    rows = rows_operator(
        _folded(radius, in_dims[0], size), _folded(theta, in_dims[1], size), n, stored, dtype
    )
    return rows.unflatten(0, (size, -1)), 0


@rows_gradient_operator.register_vmap
def _rows_gradient_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    radius: Tensor | None,
    theta: Tensor,
    n: int,
    stored: torch.dtype,
    grad: Tensor,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    radius, theta, grad = (  # type: ignore[assignment]
        _folded(tensor, axis, size)
        for tensor, axis in ((radius, in_dims[0]), (theta, in_dims[1]), (grad, in_dims[4]))
    )
    d_radius, d_theta = rows_gradient_operator(radius, theta, n, stored, grad)
    return (d_radius.unflatten(0, (size, -1)), d_theta.unflatten(0, (size, -1))), (0, 0)
