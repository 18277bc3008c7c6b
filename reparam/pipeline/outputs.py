"""Whether a converted network computes what the original computes: its outputs, which know nothing of rules and graphs.

Both run in float64, and each output is held to what :mod:`reparam.verification.rounding` explains of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reparam.errors import CheckFailedError, ReparamError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class OutputsCompared:
    """What a comparison of outputs found.

    Attributes:
        inputs: how many were run.
        max_rel: largest difference, as a share of its output's largest value.
        tolerance: the largest that rounding explains.
    """

    inputs: int
    max_rel: float
    tolerance: float


def seeded_inputs(model: nn.Module, specs: Sequence[str], seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Noise at up to three batch sizes, each of another deviation; integers within the table they are looked up in.

    Args:
        model: that takes them positionally.
        specs: as ``--input`` has them.
        seed: of the noise.

    Raises:
        ReparamError: a specification cannot be read, or the network does not take such inputs.
    """
    from reparam.graph import parse_spec
    from reparam.verification.samples import Sample, samples

    found = list(samples(model, [parse_spec(spec) for spec in specs], seed))
    inputs = [s.inputs for s in found if isinstance(s, Sample) and not s.spare]
    if not inputs:
        told = next((s for s in found if isinstance(s, str)), "it takes none")
        raise ReparamError(f"--input {' '.join(specs)}: {told}")
    return inputs


def compare_outputs(
    original: nn.Module, converted: nn.Module, inputs: Sequence[tuple[Tensor, ...]]
) -> OutputsCompared | None:
    """Run both in float64 and evaluation mode; None where the original gives no finite numbers to compare with.

    Args:
        original, converted: not changed; in any parameterization.
        inputs: positional; at least one.

    Raises:
        CheckFailedError: outputs differ in number or shape, by more than rounding explains, or one is finite alone.
    """
    from reparam.verification.exact import in_float64
    from reparam.verification.rounding import explained, perturbed

    # One wide copy at a time: a network may be large.
    want = _outputs(in_float64(original), inputs)
    got = _outputs(in_float64(converted), inputs)
    near = _outputs(perturbed(original), inputs)
    if [t.shape for t in want] != [t.shape for t in got]:
        raise CheckFailedError(_told("gives other outputs or shapes"))
    # An output's noise says nothing of another's: each is judged by its own, over all inputs.
    count = len(want) // len(inputs)
    pairs = [_apart(want[i::count], got[i::count], near[i::count]) for i in range(count)]
    judged = [(error, explained(noise)) for pair in pairs if pair for error, noise in [pair]]
    if not judged:
        return None
    error, tolerance = max(judged, key=lambda pair: pair[0] / pair[1])
    if error > tolerance:
        raise CheckFailedError(
            _told(f"differs by {error:.1e} of its outputs' scale, rounding explains {tolerance:.1e}")
        )
    return OutputsCompared(len(inputs), error, tolerance)


def _apart(
    want: Sequence[Tensor], got: Sequence[Tensor], near: Sequence[Tensor]
) -> tuple[float, float] | None:
    """Largest difference of one output and of its neighbour, relative to its scale; None where there is none to take."""
    import torch

    error = noise = 0.0
    compared = False
    for a, b, c in zip(want, got, near, strict=True):
        finite = a.isfinite()  # masked logits are −Inf
        if not a.is_floating_point() or not finite.any():
            continue
        compared = True
        scale = float(a[finite].abs().amax()) or 1.0
        apart, moved = (float((x - a)[finite].abs().nan_to_num(torch.inf).amax()) / scale for x in (b, c))
        alike = torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0))
        error, noise = max(error, apart, 0.0 if alike else torch.inf), max(noise, moved)
    return (error, noise) if compared else None


def _outputs(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """All outputs on all inputs."""
    from reparam.verification.exact import Float64, run

    return [tensor for given in inputs for tensor in run(model, given, Float64()).outputs]


def _told(what: str) -> str:
    return f"the converted network {what}; nothing was written: please report this"
