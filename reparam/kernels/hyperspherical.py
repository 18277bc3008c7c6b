"""Hyperspherical coordinates of the rows of a matrix, measured from the equator.

A row w of fan-in n is a radius r = ‖w‖ and n − 1 angles t (Chen & Ge, eq. 5-6, with t = π/2 − θ):

    u_i = sin t_i · ∏_{j<i} cos t_j  (i < n),    u_n = ∏_{j<n} cos t_j,    w = r·u
    t_i = atan2(w_i, ‖w_{i+1:}‖)  (i < n−1),     t_{n−1} = atan2(w_{n−1}, w_n)  over the full circle

The paper's colatitude θ is near π/2 for nearly every coordinate of a long row, where float32 cannot resolve its
cosine; its complement t is near 0, where float32 is at its best. Gradients agree up to sign.

Exact zeros are part of the format. π/2 is no floating-point number, so the cosine of a stored right angle is not
zero. Decoding therefore takes cos t = 0 where |t| equals π/2 *as rounded to the dtype theta was stored in*, and
sin t_{n−1} = 0 where |t_{n−1}| equals π so rounded, whatever dtype theta has by now.

This is the reference backend: float64 inside, bounded chunks of rows, any device torch knows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from reparam.errors import NonFiniteError
from reparam.kernels.trigonometry import arctangent_, sine_cosine

# Elements of one chunk of rows: its few float64 temporaries, a megabyte each, about stay in a core's own cache.
_CHUNK = 1 << 17
# Columns of one running sum, by the type of the result: its error of up to n·2⁻⁵³ must not show there.
_RUN = {torch.float64: 1024, torch.float32: 1 << 16}
# Below this |cos t| the closed form of the gradient would divide by it and lose its digits.
_SMALL_COSINE = 1e-3
# float32 atan rounds to one ulp, float64 rounded once to half of one: rows this short could tell the difference.
_SHORT_ROW = 32
# Above the cosine of a right angle rounded to float32 (4.4e-8) or float64 (6.1e-17).
_NEARLY_ZERO = 1e-6


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of at most ``_CHUNK`` elements (at least one row) that cover ``rows`` rows of ``width`` elements."""
    step = max(1, _CHUNK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@functools.cache
def right_angle(dtype: torch.dtype) -> float:
    """π/2 rounded to ``dtype``: the stored angle whose cosine is exactly zero."""
    return float(torch.tensor(math.pi / 2, dtype=dtype))


def encode(weight_RN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Radius and angles of every row.

    Args:
        weight_RN: rows of weights, shape (rows, n), any floating dtype.
        dtype: of the result, ``torch.float32`` or ``torch.float64``.

    Returns:
        r of shape (rows,) and theta of shape (rows, max(n − 1, 1)) in radians from the equator. For n = 1 theta
        is the constant ±π/2. A zero row has r = 0 and theta = 0.

    Raises:
        NonFiniteError: a weight is NaN or Inf.
    """
    rows, n = weight_RN.shape
    length = torch.empty(rows, dtype=torch.float64, device=weight_RN.device)
    theta = torch.empty(rows, max(n - 1, 1), dtype=dtype, device=weight_RN.device)
    for part in chunks(rows, n):
        _encode_chunk(weight_RN[part], length[part], theta[part])
    return stored_radius(length, dtype), theta


def stored_radius(length: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of rows as they are stored; NonFiniteError where one is NaN or Inf, or does not fit ``dtype``."""
    if not _all_finite(length):
        raise NonFiniteError("NaN or Inf")
    radius = length.to(dtype)
    if not _all_finite(radius):
        raise NonFiniteError("a row whose norm does not fit float32 (--theta-dtype float64 holds it)")
    if bool(((radius == 0) & (length > 0)).any()):
        raise NonFiniteError("a row whose norm is too small for float32 (--theta-dtype float64 holds it)")
    return radius


def row_norms(weight_RN: Tensor) -> Tensor:
    """float64 Euclidean norm of every row, shape (rows,); neither squares nor sums over- or underflow.

    Raises:
        NonFiniteError: a weight is NaN or Inf.
    """
    norms = torch.empty(weight_RN.shape[0], dtype=torch.float64, device=weight_RN.device)
    for part in chunks(*weight_RN.shape):
        w, scale = _in_range(weight_RN[part])
        norm = torch.linalg.vector_norm(w, dim=1)
        norms[part] = norm if scale is None else norm * scale[:, 0]
    if not _all_finite(norms):
        raise NonFiniteError("NaN or Inf")
    return norms


def _in_range(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """float64 rows whose squares neither over- nor underflow, and the power of two they were divided by, if any.

    Squares of float32 and narrower numbers always fit float64.
    """
    if weight.dtype != torch.float64:
        return weight.double(), None
    largest = weight.abs().amax(dim=1, keepdim=True)
    if not _all_finite(largest):
        raise NonFiniteError("NaN or Inf")
    scale = power_below(largest)
    return weight / scale, scale


def power_below(largest: Tensor) -> Tensor:
    """The power of two at or below each number, 1 for 0: dividing by it is exact and brings the number into [1, 2)."""
    return (largest / (2 * torch.frexp(largest).mantissa)).masked_fill(largest == 0, 1.0)


def _prefix_sums(squares: Tensor, run: int) -> Tensor:
    """Sums of the first k + 1 columns, in two levels where rows are longer than two runs.

    One running sum rounds every addend of equal entries to the same side: at n = 10⁶ that costs 1e-11.
    """
    n = squares.shape[1]
    if n < 2 * run:
        return squares.cumsum_(1)
    whole = n // run * run
    runs = squares[:, :whole].view(-1, whole // run, run)
    runs.cumsum_(2)
    before = runs[:, :, -1].cumsum(1)
    runs[:, 1:] += before[:, :-1, None]
    squares[:, whole:].cumsum_(1).add_(before[:, -1:])
    return squares


def _all_finite(norms: Tensor) -> bool:
    """Whether no norm is NaN or Inf, in one reduction: the largest of a NaN and anything is NaN."""
    return norms.numel() == 0 or math.isfinite(float(norms.amax()))


def _encode_chunk(weight: Tensor, length: Tensor, theta: Tensor) -> None:
    """Fill ``length`` with the norm of every row, in float64, and ``theta`` with its angles."""
    n = weight.shape[1]
    narrow = weight.dtype.itemsize == 2  # which torch turns round slowly
    # Last coordinate first: suffix norms become prefix norms.
    w, scale = _in_range((weight.float() if narrow else weight).flip(1))
    # −0.0 becomes 0.0, whose angle would otherwise be −π beside a negative last coordinate.
    w[:, :2].add_(0.0)
    # squared[:, k] = ‖w_{n−k:}‖², of the last k + 1 coordinates
    squared = _prefix_sums(w.square(), _RUN[theta.dtype])
    torch.sqrt(squared[:, -1], out=length)
    if scale is not None:
        length *= scale[:, 0]
    if n == 1:
        theta.copy_(torch.full_like(w, right_angle(theta.dtype)).copysign(w))
        return
    last = torch.atan2(w[:, 1], w[:, 0])
    if theta.dtype == torch.float32 and n >= _SHORT_ROW:
        # One rounding of the float64 tangent, one of atan. A row's trailing zeros are 0/0, and have angle 0.
        zeros = not bool(squared[:, 0].all())
        angle = arctangent_(w[:, 1:].mul_(squared[:, :-1].rsqrt_()).float().flip(1))
        if zeros:
            angle.nan_to_num_(0.0)
    else:
        angle = torch.atan2(w[:, 1:], squared[:, :-1].sqrt_()).flip(1)
    angle[:, -1] = last
    torch.add(angle, 0.0, out=theta)  # no −0.0 here either


def decode(
    theta_RT: Tensor,
    n: int,
    stored: torch.dtype,
    radius_R: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Rows r·u(theta), computed in float64 and rounded to the dtype; to 16 bits by way of float32, as torch does.

    Args:
        theta_RT: angles from the equator in radians, shape (rows, max(n − 1, 1)).
        n: fan-in; theta of width 1 belongs to n = 1 or n = 2.
        stored: dtype theta was stored in, which decides the exact zeros.
        radius_R: radius of each row, shape (rows,); unit rows without it.
        dtype: of the result.

    Returns:
        Rows of shape (rows, n).
    """
    rows, width = theta_RT.shape
    out = torch.empty(rows, n, dtype=dtype, device=theta_RT.device)
    most = max((part.stop - part.start for part in chunks(rows, n)), default=0)
    # The same memory for every chunk: it stays in a core's own cache.
    angles, work = torch.empty(2, most, width, dtype=torch.float64, device=theta_RT.device)
    unit = torch.empty(most, n, dtype=torch.float64, device=theta_RT.device)
    radius = theta_RT.new_ones(rows) if radius_R is None else radius_R
    radius = radius.double()
    for part in chunks(rows, n):
        count = part.stop - part.start
        u = out[part] if dtype == torch.float64 else unit[:count]
        _decode_chunk(theta_RT[part], stored, radius[part], angles[:count], work[:count], u)
        if dtype != torch.float64:
            out[part] = u
    return out


def _decode_chunk(
    theta: Tensor, stored: torch.dtype, r: Tensor, angle: Tensor, work: Tensor, u: Tensor
) -> None:
    """Fill ``u`` with r·∏_{j<i} cos t_j · sin t_i, a product of whole matrices; sin t_n is 1.

    ``angle`` and ``work``, shaped like theta, are overwritten.
    """
    n = u.shape[1]
    angle.copy_(theta)
    sine_cosine(angle, u[:, : n - 1] if n > 1 else u, angle, work)
    if n == 1:
        u.mul_(r[:, None])
        return
    u[:, -1] = 1.0
    u[:, -2].masked_fill_(theta[:, -1].double().abs() == 2 * right_angle(stored), 0.0)
    prefix = angle  # its cosine by now
    prefix[:, 0] *= r
    prefix.cumprod_(1)  # prefix[:, j] belongs to coordinate j + 1
    # No product is larger than its least factor: only rows whose whole product is small can hold a right angle, and
    # looking at every angle would cost more.
    steep = prefix[:, -1].abs() <= _NEARLY_ZERO * r.abs()
    if bool(steep.any()):
        cosine = _sine_cosine(theta[steep], n, stored)[1]
        cosine[:, 0] *= r[steep]
        prefix[steep] = cosine.cumprod_(1)
    u[:, 0].mul_(r)
    u[:, 1:].mul_(prefix)


def _sine_cosine(theta: Tensor, n: int, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 sines and cosines under the exact-zero rule."""
    angle = theta.double()
    cosine = angle.cos()
    if cosine.numel() and bool(cosine.abs().amin() < _NEARLY_ZERO):  # comparing every angle would cost more
        cosine.masked_fill_(angle.abs() == right_angle(stored), 0.0)
    sine = angle.sin()
    if n > 1:
        last = angle[:, -1].abs() == 2 * right_angle(stored)
        sine[:, -1].masked_fill_(last, 0.0)
    return sine, cosine


def decode_backward(theta_RT: Tensor, n: int, stored: torch.dtype, grad_RN: Tensor) -> Tensor:
    """Gradient of ``decode(theta)`` (unit rows) with respect to theta, in float64.

    With P_j = ∏_{i<j} cos t_i and S_j = sin t_j·g_j + cos t_j·S_{j+1}, S_n = g_n:

        ∂L/∂t_j = P_j·(cos t_j·g_j − sin t_j·S_{j+1})

    P_j·cos t_j·S_{j+1} = Σ_{i>j} u_i·g_i is a plain suffix sum, so rows without a small cosine need no recurrence.

    Args:
        theta_RT: angles, shape (rows, max(n − 1, 1)).
        n: fan-in.
        stored: dtype theta was stored in.
        grad_RN: gradient with respect to the unit rows, shape (rows, n).

    Returns:
        float64 gradient shaped like theta; zero for n = 1, whose direction is not trained.
    """
    out = torch.zeros(theta_RT.shape, dtype=torch.float64, device=theta_RT.device)
    if n == 1:
        return out
    for part in chunks(theta_RT.shape[0], n):
        sine, cosine = _sine_cosine(theta_RT[part], n, stored)
        grad = grad_RN[part].double()
        product = cosine.cumprod(1)
        prefix = torch.cat([torch.ones_like(product[:, :1]), product[:, :-1]], dim=1)
        steep = (cosine.abs() <= _SMALL_COSINE).any(dim=1)
        terms = torch.cat(
            [prefix[:, 1:] * sine[:, 1:] * grad[:, 1:-1], product[:, -1:] * grad[:, -1:]], dim=1
        )
        later = terms.flip(1).cumsum(1).flip(1)  # Σ_{i>j} u_i·g_i
        out[part] = prefix * cosine * grad[:, :-1] - sine * later / cosine
        if bool(steep.any()):
            state = _suffix_state(sine[steep], cosine[steep], grad[steep])
            exact = prefix[steep] * (cosine[steep] * grad[steep, :-1] - sine[steep] * state)
            out[part][steep] = exact
    return out


def _suffix_state(sine: Tensor, cosine: Tensor, grad: Tensor) -> Tensor:
    """S_{j+1} for every j, by the recurrence itself: exact whatever the cosines are."""
    # One contiguous row a step: the loop runs over coordinates, each step over all rows at once.
    drive, decay = (sine * grad[:, :-1]).t().contiguous(), cosine.t().contiguous()
    state = torch.empty_like(drive)
    state[-1] = grad[:, -1]
    for j in range(drive.shape[0] - 1, 0, -1):
        torch.addcmul(drive[j], decay[j], state[j], out=state[j - 1])
    return state.t()
