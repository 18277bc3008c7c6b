"""The map and its gradient as Triton programs, each of which goes over a few whole rows, block by block of columns.

With s_i, c_i the sine and cosine of angle i, P_i = ∏_{j<i} c_j and S_i = s_i·g_i + c_i·S_{i+1},

    w_i = r·P_i·s_i        ∂L/∂t_i = r·P_i·(c_i·g_i − s_i·S_{i+1})        ∂L/∂r = S_1

P and S inside a block are the scans of :mod:`~reparam.kernels.triton_scans`; from block to block one product and one sum
of the row. No division, so that small and zero cosines are like any others; no atomics, so that a row's result depends
on that row alone.

A float32 product of rounded cosines is off by 3e-5 of the row at n = 25,088. The scans run in float64, over cosines taken
as 1 − (1 − cos t) from a float32 1 − cos t: 4.4e-8 (pairs of float32 would be 5.0e-8, 1 − P carried in float32 1.7e-7),
with the float32 products around them 5.7e-8.
The last coordinate has no angle: as one of sine 1 it is like the others (its cosine is used by none).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from reparam.kernels.triton_scans import apart, block_product, prefix_products, suffix_states

# π/2 in two float32: turns·π/2 is taken off an angle without rounding.
_QUARTER = tl.constexpr(1.5707963705062866)
_QUARTER_LOW = tl.constexpr(-4.371138828673793e-08)
_QUARTERS_PER_RADIAN = tl.constexpr(0.6366197723675814)
# 1.5·2²³: a float32 added to it is rounded to an integer, which the last bits of the sum then are.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _narrow_sine_cosine(t, RIGHT: tl.constexpr):
    """float32 sine and float64 cosine of float32 angles up to 10⁶, to float32's accuracy; ±RIGHT, near π/2, has cosine 0.

    The cosine is ±(1 − v), v = 1 − cos r, or ± sin r: never a cosine near 1 rounded to float32.
    sin r and v are Cephes' polynomials (sinf, cosf) on [−π/4, π/4].
    """
    rounder = tl.fma(t, _QUARTERS_PER_RADIAN, _ROUNDER)
    quarter = rounder.to(tl.int32, bitcast=True)
    turns = _ROUNDER - rounder
    r = tl.fma(turns, _QUARTER_LOW, tl.fma(turns, _QUARTER, t))
    z = r * r
    sine = r + r * (z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4)))
    versed = z * (0.5 - z * (4.166664568298827e-2 - z * (1.388731625493765e-3 - z * 2.443315711809948e-5)))
    odd = (quarter & 1) == 1
    part = tl.where(tl.abs(t) == RIGHT, 0.0, tl.where(odd, sine, versed))
    cosine = tl.where(odd, 0.0, 1.0).to(tl.float64) - part.to(tl.float64)
    sine = tl.where(odd, 1.0 - versed, sine)
    # The other half of the circle: both change their sign bit.
    sine = sine.to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    cosine = cosine.to(tl.int64, bitcast=True) ^ ((quarter & 2).to(tl.int64) << 62)
    return sine.to(tl.float32, bitcast=True), cosine.to(tl.float64, bitcast=True)


@triton.jit
def _sine_cosine(
    theta,
    stride_row,
    stride,
    row,
    i,
    rows,
    n,
    RIGHT: tl.constexpr,
    STRAIGHT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of coordinates ``i`` of ``row``: the sine, float64 if WIDE, and the cosine in float64; past the angles 1 and ~0.

    With the format's exact zeros: cos t = 0 where |t| is RIGHT, sin t = 0 where the last |t| is STRAIGHT.
    """
    here = (row < rows) & (i < tl.maximum(n - 1, 1))
    t = tl.load(theta + row * stride_row + i.to(tl.int64) * stride, mask=here, other=1.5707963267948966)
    if WIDE:
        wide = t.to(tl.float64)
        sine, cosine = tl.sin(wide), tl.where(tl.abs(t) == RIGHT, 0.0, tl.cos(wide))
    else:
        sine, cosine = _narrow_sine_cosine(t, RIGHT)
    return tl.where((tl.abs(t) == STRAIGHT) & (i == n - 2), 0.0, sine), cosine


@triton.jit
def decode_kernel(
    theta,
    stride_row,
    stride,
    radius,
    out,
    rows,
    n,
    RIGHT: tl.constexpr,
    STRAIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Rows r·u(theta), shape (rows, n), contiguous; ``radius`` is contiguous or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    product = tl.full((ROWS, 1), 1.0, tl.float64)
    if radius is not None:
        product = tl.load(radius + row, mask=row < rows, other=0.0).to(tl.float64)
    for start in range(0, n, COLUMNS):
        i = start + column
        sine, cosine = _sine_cosine(theta, stride_row, stride, row, i, rows, n, RIGHT, STRAIGHT, WIDE)
        before = prefix_products(apart(cosine, RUN), sine.dtype, RUN)
        unit = product.to(sine.dtype) * before * sine
        product *= block_product(cosine)
        if out.dtype.element_ty != tl.float64:
            unit = unit.to(tl.float32)  # which every narrower type is rounded from
        tl.store(out + row * n + i, unit.to(out.dtype.element_ty), mask=(row < rows) & (i < n))


@triton.jit
def gradient_kernel(
    theta,
    stride_row,
    stride,
    radius,
    grad,
    grad_stride_row,
    grad_stride,
    d_radius,
    d_theta,
    rows,
    n,
    RIGHT: tl.constexpr,
    STRAIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradients of the radius and of theta, contiguous; BLOCKS is at least the blocks of a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    block = tl.arange(0, BLOCKS)[None, :]
    blocks = tl.cdiv(n, COLUMNS)
    product = tl.full((ROWS, 1), 1.0, tl.float64)
    if radius is not None:
        product = tl.load(radius + row, mask=row < rows, other=0.0).to(tl.float64)
    # r·P at the left edge of every block.
    edges = product + tl.zeros((ROWS, BLOCKS), tl.float64)
    for k in range(1, blocks):
        i = (k - 1) * COLUMNS + column
        _, cosine = _sine_cosine(theta, stride_row, stride, row, i, rows, n, RIGHT, STRAIGHT, WIDE)
        product *= block_product(cosine)
        edges = tl.where(block == k, product, edges)
    state = tl.zeros((ROWS, 1), tl.float64)  # S at the right edge of the block
    for done in range(blocks):
        k = blocks - 1 - done
        i = k * COLUMNS + column
        sine, cosine = _sine_cosine(theta, stride_row, stride, row, i, rows, n, RIGHT, STRAIGHT, WIDE)
        at = grad + row * grad_stride_row + i.to(tl.int64) * grad_stride
        g = tl.load(at, mask=(row < rows) & (i < n), other=0.0).to(sine.dtype)
        edge = tl.sum(tl.where(block == k, edges, 0.0), 1, keep_dims=True)
        cosines = apart(cosine, RUN)
        before = prefix_products(cosines, sine.dtype, RUN)
        later, state = suffix_states(cosines, apart(sine * g, RUN), state, sine.dtype, RUN)
        d = edge.to(sine.dtype) * before * (cosine.to(sine.dtype) * g - sine * later)
        tl.store(d_theta + row * (n - 1) + i, d.to(d_theta.dtype.element_ty), mask=(row < rows) & (i < n - 1))
    tl.store(d_radius + row, state.to(d_radius.dtype.element_ty), mask=row < rows)
