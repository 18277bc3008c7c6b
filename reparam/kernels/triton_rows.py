"""The map on a GPU: one Triton program for the rows, one for both gradients, nothing kept in between.

No result depends on data the host would have to wait for, so a CUDA graph may hold both.
"""

from __future__ import annotations

import functools
import math
import subprocess
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import TritonError

from reparam.errors import first_line
from reparam.kernels.hyperspherical import right_angle
from reparam.kernels.triton_kernels import decode_kernel, gradient_kernel

# Columns that a thread goes over by itself.
_RUN = 8
# Elements of one block, and of the wider one for rows so long that few of them have to keep the device busy.
_BLOCK, _WIDE_BLOCK = 1024, 4096
_LONG_ROW = 1 << 15
# Longer rows than this have more blocks than a program should keep the products of.
_LONGEST_ROW = 1 << 24
_FLOATS = (torch.float32, torch.float64)


def refusal(theta: Tensor) -> str | None:
    """Why these angles are left to the reference, or None."""
    if theta.dtype not in _FLOATS:
        return f"angles are {theta.dtype}"
    if theta.shape[1] >= _LONGEST_ROW:
        return f"rows of {theta.shape[1]} angles"
    return _fault(theta.device) if theta.is_cuda else None


@functools.cache
def _fault(device: torch.device) -> str | None:
    """Why Triton runs nothing on a device (no C compiler, an old GPU), found out by mapping one row there."""
    try:
        decode(torch.zeros(1, 1, device=device), 2, torch.float32, None, torch.float32)
    except (RuntimeError, OSError, subprocess.CalledProcessError, TritonError) as error:
        return first_line(error)
    return None


def decode(
    theta_RT: Tensor,
    n: int,
    stored: torch.dtype,
    radius_R: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """See :func:`reparam.kernels.hyperspherical.decode`; float64 inside where theta or the result is, else float32."""
    rows = theta_RT.shape[0]
    out = torch.empty(rows, n, dtype=dtype, device=theta_RT.device)
    wide = torch.float64 in (theta_RT.dtype, dtype)
    radius = None if radius_R is None else radius_R.contiguous()
    tile, launch = _tile(n)
    if rows:
        with torch.cuda.device(theta_RT.get_device()):  # of no effect on the CPU
            decode_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                theta_RT, *theta_RT.stride(), radius, out, rows, n,
                *_exact_zeros(stored, theta_RT.dtype), WIDE=wide, **tile, **launch,
            )  # fmt: skip
    return out


def rows_gradient(
    radius_R: Tensor | None, theta_RT: Tensor, n: int, stored: torch.dtype, grad_RN: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`reparam.kernels.gradient.rows_gradient`; float64 inside where theta or grad is, else float32."""
    rows = theta_RT.shape[0]
    d_radius = theta_RT.new_empty(rows)
    d_theta = torch.empty_like(theta_RT, memory_format=torch.contiguous_format)
    wide = torch.float64 in (theta_RT.dtype, grad_RN.dtype)
    radius = None if radius_R is None else radius_R.contiguous()
    # A transposed gradient would be read a few bytes at a time; an expanded one is fine as it is.
    grad = grad_RN if n == 1 or grad_RN.stride(1) in (0, 1) else grad_RN.contiguous()
    tile, launch = _tile(n)
    if rows:
        with torch.cuda.device(theta_RT.get_device()):  # of no effect on the CPU
            gradient_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                theta_RT, *theta_RT.stride(), radius, grad, *grad.stride(), d_radius, d_theta, rows, n,
                *_exact_zeros(stored, theta_RT.dtype), WIDE=wide, **tile,
                BLOCKS=triton.next_power_of_2(triton.cdiv(n, tile["COLUMNS"])), **launch,
            )  # fmt: skip
    if n == 1:
        d_theta.zero_()  # the direction of a row of one is not trained
    return d_radius, d_theta


def _tile(n: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Shape of a block and how to launch it, by the length of a row alone: so is, then, the order of its sums."""
    size = _BLOCK if n <= _LONG_ROW else _WIDE_BLOCK
    columns = min(size, triton.next_power_of_2(n))
    tile = {"ROWS": size // columns, "COLUMNS": columns, "RUN": min(_RUN, columns)}
    # Said, as a release of Triton that changes the default warns where nothing is said.
    return tile, {"num_warps": size // 256, "enable_fp_fusion": True}


@functools.cache
def _exact_zeros(stored: torch.dtype, dtype: torch.dtype) -> tuple[float, float]:
    """π/2 and π rounded to ``stored``, or inf, which no angle equals, where ``dtype`` does not hold that number."""
    rounded = (right_angle(stored), float(torch.tensor(math.pi, dtype=stored)))
    right, straight = (x if float(torch.tensor(x, dtype=dtype)) == x else math.inf for x in rounded)
    return right, straight
