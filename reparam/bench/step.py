"""The training step of a network in each parameterization, against the plain one's.

    SP          plain weights                         BN        plain weights, batch norm after every convolution
    WN          weight normalization                  WN+MBN    the same with the mini-batch mean subtracted
    GmP         geometric parameterization            GmP+MN    the same with the mean of its inputs subtracted

A step is zero_grad, forward, cross-entropy, backward and SGD with momentum, on a batch that lies on the device. Steps of
all variants are interleaved, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from reparam.bench.machine import describe, existing_device, wait_for
from reparam.errors import ReparamError

if TYPE_CHECKING:
    import torch
    from torch import nn

SP, BN, WN, WN_MBN, GMP, GMP_MN = VARIANTS = ("SP", "BN", "WN", "WN+MBN", "GmP", "GmP+MN")
_CONVERTED: dict[str, tuple[str, Literal["mn", "mbn"] | bool]] = {
    WN: ("wn", False),
    WN_MBN: ("wn", "mbn"),
    GMP: ("gmp", False),
    GMP_MN: ("gmp", "mn"),
}
#: time to the SP step's at most, of ResNet-34 on a GPU; both also faster than BN
BARS = {GMP: 1.03, GMP_MN: 1.08}
DTYPES = ("float32", "bfloat16", "float16")
#: of a batch, and of an image's side, where nothing is said and no GPU is there
CPU_BATCH, CPU_PIXELS = 8, 64
GPU_BATCH = 256


@dataclass(frozen=True)
class StepResult:
    """Medians over the repeats of one variant.

    Attributes:
        model, name: network and variant.
        compiled: run through torch.compile.
        ratio: median over the repeats of its time to that of the SP step run the same way in the same repeat.
        bar: of the ratio, None where there is none.
        seconds: of one step.
        peak_mb: most memory its step took on the device, parameters, gradients and momentum among it; None on a CPU.
        loss: of the last step; every variant starts from the same function but BN's, on the same batch.
    """

    model: str
    name: str
    compiled: bool
    ratio: float
    bar: float | None
    seconds: float
    peak_mb: float | None
    loss: float


def bench_step(
    models: Sequence[str],
    batch_size: int | None,
    repeats: int,
    tell: Callable[[str], None],
    dtype: str = "float32",
    device: str = "auto",
    compiled: bool = False,
) -> dict[str, Any]:
    """Time the steps of every variant.

    Args:
        models: of :data:`reparam.bench.networks.NETWORKS`.
        batch_size: 256 on a GPU and 8 elsewhere for None.
        repeats: of every step; medians are reported.
        tell: told what is being done.
        dtype: "float32", or what autocast runs in.
        device: as torch names it, or "auto".
        compiled: measure every variant through torch.compile as well.

    Returns:
        JSON value: machine, settings, and a :class:`StepResult` a model, way of running and variant.

    Raises:
        ReparamError: no such model, type or device.
    """
    from reparam.bench.networks import NETWORKS

    for name in models:
        if name not in NETWORKS:
            raise ReparamError(f"--model {name}: one of {', '.join(NETWORKS)}")
    if dtype not in DTYPES:
        raise ReparamError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    device = existing_device(device)
    batch = batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
    results, pixels = [], {}
    for name in models:
        side = NETWORKS[name].pixels
        pixels[name] = min(side, CPU_PIXELS) if device == "cpu" else side
        for through_compiler in (False, True) if compiled else (False,):
            way = "compiled" if through_compiler else "eager"
            tell(f"{name}, {way}: {repeats} repeat{'s' * (repeats > 1)} of {len(VARIANTS)} steps")
            steps = _steps(name, batch, pixels[name], dtype, device, through_compiler)
            results += _measure(name, steps, repeats, device, through_compiler)
    return {
        "what": "step",
        "machine": describe(),
        "settings": {
            "batch_size": batch,
            "pixels": pixels,
            "repeats": repeats,
            "dtype": dtype,
            "device": device,
            "backend": _backend(device),
        },
        "results": [asdict(result) for result in results],
    }


class Step:
    """One variant's training, a step a call.

    Attributes:
        loss: of the last step.
    """

    def __init__(
        self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, dtype: str, compiled: bool
    ) -> None:
        import torch

        self.model = model
        self.loss = torch.zeros(())
        self._run: Any = torch.compile(model) if compiled else model
        self._inputs, self._targets = inputs, targets
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self._autocast = torch.autocast(
            inputs.device.type, getattr(torch, dtype) if dtype != "float32" else None, dtype != "float32"
        )
        self._scaler = torch.amp.GradScaler(inputs.device.type, enabled=dtype == "float16")

    def __call__(self) -> None:
        from torch.nn import functional as F

        self._optimizer.zero_grad()
        with self._autocast:
            loss = F.cross_entropy(self._run(self._inputs), self._targets)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.loss = loss.detach()

    def held(self) -> int:
        """Bytes that stay between steps."""
        state = [v for s in self._optimizer.state.values() for v in s.values() if hasattr(v, "nbytes")]
        parameters = [*self.model.parameters()]
        grads = [p.grad for p in parameters if p.grad is not None]
        return sum(t.nbytes for t in (*parameters, *self.model.buffers(), *grads, *state))


def _steps(name: str, batch: int, pixels: int, dtype: str, device: str, compiled: bool) -> dict[str, Step]:
    import torch

    from reparam.bench.networks import NETWORKS
    from reparam.graph import convert

    torch.manual_seed(0)
    inputs = torch.randn(batch, 3, pixels, pixels).to(device)
    targets = torch.randint(1000, (batch,)).to(device)
    plain = NETWORKS[name].make(False)
    made = {SP: plain, BN: NETWORKS[name].make(True)}
    made |= {variant: convert(plain, to, mean_norm=mean) for variant, (to, mean) in _CONVERTED.items()}
    return {v: Step(made[v].train().to(device), inputs, targets, dtype, compiled) for v in VARIANTS}


def _measure(
    name: str, steps: dict[str, Step], repeats: int, device: str, compiled: bool
) -> list[StepResult]:
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for step in steps.values():
        step()  # compiles, and picks algorithms
    memory = {variant: _peak_mb(step, device) for variant, step in steps.items()}
    for _ in range(repeats):
        for variant, step in steps.items():
            times[variant].append(_time(step, device))
    barred = device != "cpu" and name == "resnet34"
    return [
        StepResult(
            name,
            variant,
            compiled,
            statistics.median(own / plain for own, plain in zip(times[variant], times[SP], strict=True)),
            BARS.get(variant) if barred else None,
            statistics.median(times[variant]),
            memory[variant],
            float(step.loss),
        )
        for variant, step in steps.items()
    ]


def _time(step: Callable[[], None], device: str) -> float:
    wait_for(device)
    began = time.perf_counter()
    step()
    wait_for(device)
    return time.perf_counter() - began


def _peak_mb(step: Step, device: str) -> float | None:
    """Most memory of one step, what the other variants hold not counted."""
    import torch

    if not device.startswith("cuda"):
        step()
        return None
    others = torch.cuda.memory_allocated(device) - step.held()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - others) / 1e6


def _backend(device: str) -> str:
    import torch

    from reparam.kernels import backend

    return backend.name(torch.empty(1, 1, device=device))
