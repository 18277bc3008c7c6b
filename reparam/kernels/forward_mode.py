"""The map by torch's operations, for forward-mode differentiation.

Through an operator of one's own torch passes no tangents, and does not say so: every derivative would be zero. These
operations have them, of any level, at the price of memory for each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reparam.kernels.hyperspherical import right_angle

# Looked up, since a compiler does not follow the function.
_RIGHT = {
    dtype: right_angle(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def is_active() -> bool:
    """Whether there may be tangents: within ``forward_ad.dual_level``, ``torch.func.jvp``, ``jacfwd`` or ``hessian``."""
    return forward_ad._current_level >= 0


def decode(
    theta_RT: Tensor, n: int, stored: torch.dtype, radius_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See :func:`reparam.kernels.hyperspherical.decode`."""
    angle = theta_RT.double()
    sine, cosine = angle.sin(), angle.cos()
    # Exact zeros, which move with their angles as any other cosine and sine.
    right = _RIGHT[stored]
    cosine = cosine - (cosine * (angle.abs() == right)).detach()
    last = torch.arange(angle.shape[1], device=angle.device) == angle.shape[1] - 1
    straight = last & (angle.abs() == 2 * right)
    sine = sine - (sine * straight).detach()
    if n == 1:
        unit = sine.detach()  # the direction of a row of one is not trained
    else:
        through = cosine.cumprod(1)
        ones = torch.ones_like(through[:, :1])
        unit = torch.cat([ones, through], 1) * torch.cat([sine, ones], 1)
    rows = unit if radius_R is None else radius_R.double()[:, None] * unit
    return rows.to(dtype) if dtype == torch.float64 else rows.float().to(dtype)
