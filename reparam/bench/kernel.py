"""The hyperspherical map, forward and backward, against what one would use without it.

    copy                    the weight and its gradient copied once each: what memory can do
    torch._weight_norm      g·v/‖v‖, torch's own fused kernel
    naive cumprod autograd  the formula of the map as one writes it down
    reparam                 the map as the layers run it

All jobs but the copy make a weight matrix from trained tensors and take the gradient back to them. They are
interleaved, so that a machine that slows down slows all of them. A job's bandwidth counts what it has to read and write
once: two tensors twice for the copy, and for the others the trained tensor, the weight, the trained tensor again, the
gradient that comes and the one that goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reparam.bench.machine import describe, existing_device, wait_for
from reparam.errors import ReparamError

if TYPE_CHECKING:
    import torch

#: rows × fan-in: a first convolution, a gate of width one, a ResNet's last convolution, attention and MLP of a
#: language model
SHAPES = ((64, 27), (100, 1), (512, 4608), (4096, 4096), (11008, 4096))

COPY, WEIGHT_NORM, NAIVE, OURS = "copy", "torch._weight_norm", "naive cumprod autograd", "reparam"
JOBS = (COPY, WEIGHT_NORM, NAIVE, OURS)
DTYPES = ("float32", "bfloat16", "float16")


#: of the copy and the rest: of the weight's dtype, and float32, which trained tensors have, in elements of the weight
_TRAFFIC = {COPY: (2, 2), WEIGHT_NORM: (2, 3), NAIVE: (2, 3), OURS: (2, 3)}


@dataclass(frozen=True)
class Bar:
    """What the map has to keep to: its time to that of the other job at most, its bandwidth to the copy's at least."""

    to_weight_norm: float
    to_naive: float | None = None
    bandwidth: float | None = None


#: of the map, by the backend that runs it and the shape: on a CPU in float32, on a GPU whatever the type
BARS: dict[str, dict[tuple[int, int], Bar]] = {
    "reference": {(4096, 4096): Bar(6.0, 0.5)},
    "compiled": {(4096, 4096): Bar(2.0, 0.5)},
    "triton": {(4096, 4096): Bar(1.0, bandwidth=0.8), (11008, 4096): Bar(1.0, bandwidth=0.8)},
}


@dataclass(frozen=True)
class JobResult:
    """Medians over the repeats of one job on one shape.

    Attributes:
        shape: rows, fan-in.
        name: of the job.
        to_weight_norm, to_naive, to_copy: medians over the repeats of this job's time to theirs of the same repeat.
        bandwidth: to the copy's, median over the repeats.
        bar: of these ratios, None where there is none.
        seconds: of one forward and backward pass.
        gigabytes_per_second: the job's bandwidth.
    """

    shape: tuple[int, int]
    name: str
    to_weight_norm: float
    to_naive: float
    to_copy: float
    bandwidth: float
    bar: Bar | None
    seconds: float
    gigabytes_per_second: float


def bench_kernel(
    repeats: int,
    tell: Callable[[str], None],
    max_elements: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Time the jobs on every shape.

    Args:
        repeats: of every job; medians are reported.
        tell: told what is being done.
        max_elements: leave out shapes of more weights than this.
        dtype: of the weight, "float32", "bfloat16" or "float16"; trained tensors are float32.
        device: as torch names it, or "auto".

    Returns:
        JSON value: machine, settings with the backend that ran the map, and a :class:`JobResult` a shape and job.

    Raises:
        ReparamError: every shape has more than ``max_elements``, no such type, or no such device here.
    """
    import torch

    from reparam.kernels import backend

    if dtype not in DTYPES:
        raise ReparamError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    device = existing_device(device)
    shapes = [s for s in SHAPES if max_elements is None or s[0] * s[1] <= max_elements]
    if not shapes:
        smallest = min(rows * n for rows, n in SHAPES)
        raise ReparamError(f"--max-weights {max_elements}: the smallest shape has {smallest}")
    results = []
    for shape in shapes:
        tell(f"{shape[0]} × {shape[1]}: {repeats} repeat{'s' * (repeats > 1)} of {len(JOBS)} jobs")
        results += _measure(shape, repeats, dtype, device)
    return {
        "what": "kernel",
        "machine": describe(),
        "settings": {
            "repeats": repeats,
            "dtype": dtype,
            "device": device,
            "backend": backend.name(torch.empty(1, 1, device=device)),
            "pass": "forward + backward",
        },
        "results": [asdict(result) for result in results],
    }


def _measure(shape: tuple[int, int], repeats: int, dtype: str, device: str) -> list[JobResult]:
    jobs = _jobs(shape, dtype, device)
    # Small shapes are over in microseconds: each measurement repeats them to be longer than the clock's noise.
    inner = max(1, min(200, (1 << 20) // (shape[0] * shape[1])))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            seconds = _time(job, inner, device)
            if repeat:  # the first is warm-up
                times[name].append(seconds)

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    narrow = 4 if dtype == "float32" else 2
    nbytes = {name: (a * narrow + b * 4) * shape[0] * shape[1] for name, (a, b) in _TRAFFIC.items()}
    bars = BARS.get(_backend(device), {}) if device != "cpu" or dtype == "float32" else {}
    return [
        JobResult(
            shape,
            name,
            ratio(name, WEIGHT_NORM),
            ratio(name, NAIVE),
            ratio(name, COPY),
            nbytes[name] / nbytes[COPY] / ratio(name, COPY),
            bars.get(shape) if name == OURS else None,
            seconds := statistics.median(times[name]),
            nbytes[name] / seconds / 1e9,
        )
        for name in JOBS
    ]


def _backend(device: str) -> str:
    import torch

    from reparam.kernels import backend

    return backend.choose(torch.empty(1, 1, device=device)).name


def _time(job: Callable[[], None], inner: int, device: str) -> float:
    wait_for(device)
    began = time.perf_counter()
    for _ in range(inner):
        job()
    wait_for(device)
    return (time.perf_counter() - began) / inner


def _jobs(shape: tuple[int, int], dtype: str, device: str) -> dict[str, Callable[[], None]]:
    import torch

    from reparam.kernels.hyperspherical import encode
    from reparam.kernels.operator import compose_rows

    rows, n = shape
    compute: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, n, generator=generator).to(device)
    grad = torch.randn(rows, n, generator=generator).to(device=device, dtype=compute)
    r, theta = (tensor.requires_grad_() for tensor in encode(weight, torch.float32))
    v = weight.clone().requires_grad_()
    g = r.detach().clone().reshape(rows, 1).requires_grad_()

    def copy() -> None:
        weight.clone().copy_(grad)

    def weight_norm() -> None:
        torch.autograd.grad(torch._weight_norm(v, g, 0).to(compute), (v, g), grad)

    def naive() -> None:
        torch.autograd.grad(_naive(r, theta, n).to(compute), (r, theta), grad)

    def ours() -> None:
        torch.autograd.grad(compose_rows(r, theta, n, torch.float32, compute), (r, theta), grad)

    return dict(zip(JOBS, (copy, weight_norm, naive, ours), strict=True))


def _naive(r: torch.Tensor, theta: torch.Tensor, n: int) -> torch.Tensor:
    """The formula as one writes it down, left to autograd."""
    import torch

    sine, prefix = theta.sin(), theta.cos().cumprod(1)
    if n == 1:
        return r[:, None] * sine
    u = torch.cat([sine[:, :1], prefix[:, :-1] * sine[:, 1:], prefix[:, -1:]], dim=1)
    return r[:, None] * u
