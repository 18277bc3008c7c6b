"""Rows of g·v/‖v‖ that torch's fused kernel cannot take, on a GPU: a program a row, which ends at once for the others."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reparam.kernels import weight_norm

_SMALLEST = tl.constexpr(weight_norm.SMALLEST)
_LARGEST = tl.constexpr(weight_norm.LARGEST)
_LARGEST_SCALE = tl.constexpr(weight_norm.LARGEST_SCALE)


def mend_weight(weight: Tensor, g: Tensor, v: Tensor, norms: Tensor) -> None:
    """Compose in place what the kernel could not; all contiguous float32, not empty, rows on axis 0."""
    n = v[0].numel()
    with torch.cuda.device(v.get_device()):  # of no effect on the CPU
        _weight_kernel[(v.shape[0],)](weight, g, v, norms, n, **_tile(n))


def mend_gradient(d_v: Tensor, d_g: Tensor, grad: Tensor, g: Tensor, v: Tensor, norms: Tensor) -> None:
    """The same of the gradients of v and g, by that of the weight."""
    n = v[0].numel()
    with torch.cuda.device(v.get_device()):
        _gradient_kernel[(v.shape[0],)](d_v, d_g, grad, g, v, norms, n, **_tile(n))


def _tile(n: int) -> dict[str, int | bool]:
    return {"COLUMNS": min(1024, triton.next_power_of_2(n)), "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _is_ordinary(g, norm):
    return (norm > _SMALLEST) & (norm < _LARGEST) & (tl.abs(g) < _LARGEST_SCALE)


@triton.jit
def _along(v, other, n, COLUMNS: tl.constexpr):
    """The dot product of two rows in float64, whose range holds every square of a float32."""
    total = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, n, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        x = tl.load(v + i, mask=i < n, other=0.0).to(tl.float64)
        total += x * tl.load(other + i, mask=i < n, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _norm(v, n, COLUMNS: tl.constexpr):
    norm = tl.sqrt(_along(v, v, n, COLUMNS))
    return tl.where(norm == 0, 1.0, norm)


@triton.jit
def _weight_kernel(weight, g, v, norms, n, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(g + row)
    if not _is_ordinary(scale, tl.load(norms + row)):
        weight += row * n
        v += row * n
        factor = scale.to(tl.float64) / _norm(v, n, COLUMNS)
        for start in range(0, n, COLUMNS):
            i = start + tl.arange(0, COLUMNS)
            x = tl.load(v + i, mask=i < n, other=0.0).to(tl.float64)
            tl.store(weight + i, (x * factor).to(tl.float32), mask=i < n)


@triton.jit
def _gradient_kernel(d_v, d_g, grad, g, v, norms, n, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(g + row)
    if not _is_ordinary(scale, tl.load(norms + row)):
        d_v += row * n
        grad += row * n
        v += row * n
        norm = _norm(v, n, COLUMNS)
        along = _along(v, grad, n, COLUMNS) / norm
        tl.store(d_g + row, along.to(tl.float32))
        for start in range(0, n, COLUMNS):
            i = start + tl.arange(0, COLUMNS)
            x = tl.load(v + i, mask=i < n, other=0.0).to(tl.float64)
            toward = tl.load(grad + i, mask=i < n, other=0.0).to(tl.float64)
            change = scale.to(tl.float64) / norm * (toward - x / norm * along)
            tl.store(d_v + i, change.to(tl.float32), mask=i < n)
