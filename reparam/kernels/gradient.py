"""Gradient of the rows r·u(theta) with respect to r and theta, both in one pass over the angles.

With P_j = ∏_{i<j} cos t_i and g the gradient with respect to the rows,

    ∂L/∂r = Σ_i u_i·g_i        ∂L/∂t_j = r·(P_{j+1}·g_j − tan t_j·Σ_{i>j} u_i·g_i)

which is the recurrence of :func:`reparam.kernels.hyperspherical.decode_backward` divided through by cos t_j. The last
angle needs no division, ∂L/∂t_{n−1} = r·P_{n−1}·(cos t_{n−1}·g_{n−1} − sin t_{n−1}·g_n), and is the only one whose
cosine is often near zero. Rows with another such cosine, which the division would spoil, are left to that recurrence.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from reparam.kernels.hyperspherical import chunks, decode, decode_backward, right_angle

# Below this |cos t| the closed form would divide by it and lose its digits.
_SMALL_COSINE = 1e-3
# Down to this product of all cosines but the last, differences of running sums keep 13 digits of every gradient.
_SMALL_PRODUCT = 1e-3
assert _SMALL_PRODUCT >= _SMALL_COSINE


def rows_gradient(
    radius_R: Tensor | None, theta_RT: Tensor, n: int, stored: torch.dtype, grad_RN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``decode(theta, n, stored, radius)``.

    Args:
        radius_R: radius of each row, shape (rows,); unit rows without it.
        theta_RT: angles from the equator in radians, shape (rows, max(n − 1, 1)).
        n: fan-in.
        stored: dtype theta was stored in, which decides the exact zeros.
        grad_RN: gradient with respect to the rows, shape (rows, n), any floating dtype.

    Returns:
        Gradients of the radius, shape (rows,), and of theta, computed in float64 and rounded to theta's dtype.
        Theta's is zero for n = 1, whose direction is not trained.
    """
    rows = theta_RT.shape[0]
    d_radius = theta_RT.new_empty(rows)
    d_theta = torch.empty_like(theta_RT, memory_format=torch.contiguous_format)
    for part in chunks(rows, n):
        radius = None if radius_R is None else radius_R[part].double()
        grad = grad_RN[part].double()
        d_radius[part], d_theta[part] = _chunk(radius, theta_RT[part], n, stored, grad)
    return d_radius, d_theta


def _chunk(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, grad: Tensor
) -> tuple[Tensor, Tensor]:
    if n <= 2:
        return _recurrence(radius, theta, n, stored, grad)
    angle = theta.double()
    cosine = angle.cos()
    # The format's exact zeros: that of an earlier cosine is seen to by the recurrence.
    right, straight = _rounded_angles(stored)
    cosine[:, -1].masked_fill_(theta[:, -1].abs() == right, 0.0)
    prefix = cosine.cumprod(1)  # prefix[:, j] = P_{j+2}: the first, P_1 = 1, is left out
    tangent = angle.sin()
    tangent[:, -1].masked_fill_(theta[:, -1].abs() == straight, 0.0)
    terms = torch.empty_like(grad)  # u_i·g_i
    terms[:, 0], terms[:, -1] = tangent[:, 0], prefix[:, -1]
    torch.mul(prefix[:, :-1], tangent[:, 1:], out=terms[:, 1:-1])
    terms *= grad
    # Σ_{i>j} is the sum of all less Σ_{i≤j}, where what it is multiplied with is not small against its rounding.
    faint = (prefix[:, -2].abs() <= _SMALL_PRODUCT).nonzero()[:, 0]
    exact = terms[faint, 1:].flip(1).cumsum_(1).flip(1) if len(faint) else None
    summed = terms.cumsum_(1)
    d_radius = summed[:, -1].clone()
    steep = faint
    if exact is not None:
        # No product is larger than its least factor: a small cosine is in a faint row.
        steep = faint[(cosine[faint, :-1].abs() <= _SMALL_COSINE).any(dim=1)]
    last = prefix[:, -2] * (cosine[:, -1] * grad[:, -2] - tangent[:, -1] * grad[:, -1])
    tangent /= cosine
    later = torch.sub(d_radius[:, None], summed[:, :-1], out=cosine)
    if exact is not None:
        later[faint] = exact
    d_theta = prefix.mul_(grad[:, :-1]).addcmul_(tangent, later, value=-1)
    d_theta[:, -1] = last  # whatever a cosine of zero has left there
    if radius is not None:
        d_theta *= radius[:, None]
    if steep.numel():
        of = None if radius is None else radius[steep]
        d_radius[steep], d_theta[steep] = _recurrence(of, theta[steep], n, stored, grad[steep])
    return d_radius, d_theta


@functools.cache
def _rounded_angles(stored: torch.dtype) -> tuple[float, float]:
    """π/2 and π rounded to ``stored``."""
    return right_angle(stored), float(torch.tensor(math.pi, dtype=stored))


def _recurrence(
    radius: Tensor | None, theta: Tensor, n: int, stored: torch.dtype, grad: Tensor
) -> tuple[Tensor, Tensor]:
    d_radius = (decode(theta, n, stored) * grad).sum(1)
    scaled = grad if radius is None else grad * radius[:, None]
    return d_radius, decode_backward(theta, n, stored, scaled)
