"""The map on a CPU in compiled loops: every angle is read where it lies and looked at in registers, not in passes.

:mod:`reparam.kernels.compiled_loops` and :mod:`reparam.kernels.compiled_angles` have the loops; here they are called as
the reference is, on torch's tensors and on as many threads as torch would take. Needs numba.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reparam.kernels import hyperspherical
from reparam.kernels.compiled_angles import angles
from reparam.kernels.compiled_loops import LANES, gradient, rows
from reparam.kernels.hyperspherical import right_angle, stored_radius

# Angles from which on a thread is worth its start.
_SHARE = 1 << 17


def _numpy(tensor: Tensor) -> Any:
    """The tensor's memory as an array; ``Tensor.numpy`` would leave storage that nobody (FSDP) may resize any more."""
    return np.from_dlpack(tensor.detach())


if not _numpy(torch.empty(1)).flags.writeable:
    raise ImportError(f"numpy {np.__version__} gives read-only arrays: 2.2.5 or later")


def refusal(theta: Tensor) -> str | None:
    """Why these angles cannot be mapped here; None where they can."""
    return None if theta.dtype in (torch.float32, torch.float64) else f"angles in {theta.dtype}"


def prepare() -> None:
    """Have the loops of a conversion built, or read back, before processes are forked that would each do it.

    An interrupt waits until that is done: within a compiler it would get lost, or leave something half-built.
    """
    interrupts: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number)) if main else None
    try:
        for dtype in (torch.float32, torch.float64):
            radius, theta = encode(torch.ones(1, 2), dtype)
            decode(theta, 2, dtype, radius)
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def encode(weight_RN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Radius and angles of every row: see :func:`reparam.kernels.hyperspherical.encode`."""
    rows, n = weight_RN.shape
    if n == 1 or weight_RN.dtype == torch.float64:  # whose squares may not fit float64
        return hyperspherical.encode(weight_RN, dtype)
    weight = weight_RN.detach().float().contiguous()
    length, theta = torch.empty(rows, dtype=torch.float64), torch.empty(rows, n - 1, dtype=dtype)
    _in_threads(angles, [_numpy(weight), _numpy(length), _numpy(theta)], (), weight.numel())
    return stored_radius(length, dtype), theta


def decode(
    theta_RT: Tensor,
    n: int,
    stored: torch.dtype,
    radius_R: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Rows r·u(theta): see :func:`reparam.kernels.hyperspherical.decode`."""
    theta = theta_RT.detach().contiguous()
    out = theta.new_empty(len(theta), n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = [_numpy(theta), _radius(radius_R, theta), _numpy(out)]
    _in_threads(rows, arguments, _zeros(stored), theta.numel())
    return out.to(dtype)


def rows_gradient(
    radius_R: Tensor | None, theta_RT: Tensor, n: int, stored: torch.dtype, grad_RN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to radius and theta: see :func:`reparam.kernels.gradient.rows_gradient`."""
    theta = theta_RT.detach().contiguous()
    grad = (
        grad_RN.detach().to(theta.dtype if grad_RN.itemsize < theta.itemsize else grad_RN.dtype).contiguous()
    )
    d_radius, d_theta = theta.new_empty(len(theta), dtype=torch.float64), torch.empty_like(theta)
    arguments = [_numpy(theta), _radius(radius_R, theta), _numpy(grad), _numpy(d_radius), _numpy(d_theta)]
    _in_threads(gradient, arguments, _zeros(stored), theta.numel())
    return d_radius.to(theta.dtype), d_theta.zero_() if n == 1 else d_theta


def _radius(radius: Tensor | None, theta: Tensor) -> Any:
    return np.ones(len(theta)) if radius is None else _numpy(radius.double().contiguous())


def _zeros(stored: torch.dtype) -> tuple[float, float]:
    """The angles whose cosine, and sine, are exactly zero: π/2 and π as rounded to ``stored``."""
    return right_angle(stored), float(torch.tensor(math.pi, dtype=stored))


def _in_threads(
    function: Callable[..., None], arrays: list[Any], constants: tuple[float, ...], angles: int
) -> None:
    """Run on as many threads as torch would, none of which outlives the call: forked processes miss nothing."""
    total = len(arrays[0])
    count = max(1, min(torch.get_num_threads(), angles // _SHARE, total // LANES))
    ends = [*(total * part // count // LANES * LANES for part in range(count)), total]
    shares = [[array[begin:end] for array in arrays] for begin, end in pairwise(ends)]
    if count == 1:
        function(*shares[0], *constants)
        return
    with ThreadPoolExecutor(count - 1) as threads:
        others = [threads.submit(function, *share, *constants) for share in shares[1:]]
        function(*shares[0], *constants)
        for other in others:
            other.result()
