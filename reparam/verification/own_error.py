"""The original at the deployed dtype, and its own error in more runs than one.

Where all values of an output follow from one intermediate number whose rounding is amplified, as a log-variance's is by an
exponential, the original's error and the file's are one random number each. Of two from the same normal distribution
the first is more than 4 times the second in 16 % of cases, however right the file is. So none is refused by one run: the
original's error is measured at inputs x' next to the given ones x too, where everything behind them is rounded anew,

    f(x') − y(x')        f the original at the deployed dtype, y the original in float64, both at the same x'

and never f(x') − y(x): that is how far the output follows its input, with which even an original that rounds nothing
would excuse any file behind a step, or behind a difference of large inputs. Neighbours are drawn as in Monte Carlo
arithmetic (Parker 1997) and the stochastic arithmetic of CESTAC (Vignes 1993), of the inputs alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reparam.layers import Reparameterized
from reparam.verification.exact import Float64, reference_copy, run
from reparam.verification.pools import Pool
from reparam.verification.samples import Sample

#: inputs drawn next to each one that is judged
DRAWS = 16
_SEED = 0


@dataclass(frozen=True)
class Judged:
    """The inputs of one run, and where the errors at them went.

    Attributes:
        sample: the inputs.
        outputs: pools of the outputs that were compared, by place.
        logits: the same of what outputs are the softmax or sigmoid of.
    """

    sample: Sample
    outputs: dict[int, Pool] = field(default_factory=dict)
    logits: dict[int, Pool] = field(default_factory=dict)


def at_dtype(reference: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the original whose floating type is the deployed one, in evaluation mode."""
    own = reference_copy(reference)
    return own if _dtype(reference) == dtype else own.to(dtype)


def measure_again(
    own: nn.Module,
    exact: nn.Module,
    dtype: torch.dtype,
    kinds: Sequence[torch.dtype | None],
    judged: Iterable[Judged],
    pools: Collection[Pool],
) -> None:
    """Add to the own errors of ``pools`` those at :data:`DRAWS` inputs next to every one, each against float64 there.

    A draw is left out where nothing moved (integers alone, say) and where the original does not take it, in float64 or
    at the deployed dtype; and for an output that either of the two overflows on.

    Args:
        own: the original at the deployed dtype.
        exact: it in float64; runs on the same inputs.
        dtype: the deployed one.
        kinds: types of the file's inputs.
        judged: what was compared; nothing else is.
        pools: of the outputs in question.
    """
    generator = torch.Generator().manual_seed(_SEED)
    half_ulp = torch.finfo(dtype).eps / 2
    for one in judged:
        outputs, logits = (
            {i: pool for i, pool in found.items() if pool in pools} for found in (one.outputs, one.logits)
        )
        if not outputs and not logits:
            continue
        sample = one.sample.cast(kinds)
        for _ in range(DRAWS):
            moved = [_moved(x, half_ulp, generator) for x in sample.inputs]
            if all(map(torch.equal, moved, sample.inputs)):
                continue
            try:
                y, f = run(exact, moved, Float64()), run(own, moved)
            except Exception:  # whatever a forward pass raises: its domain may end at these inputs
                continue
            for i, pool in outputs.items():
                pool.add_own(sample.group, y.outputs[i], f.outputs[i])
            for i, pool in logits.items():
                inner, rounded = y.logits(i), f.logits(i)
                if inner is not None and rounded is not None:
                    pool.add_own(sample.group, inner, rounded)


def _moved(x: Tensor, half_ulp: float, generator: torch.Generator) -> Tensor:
    """Values moved by up to ± half an ulp of 1, relative, and rounded to their type.

    Whole numbers stay, of whatever type. A mask's 1 or a count was never rounded, and beside it a network may compute
    something else, with other errors: the 10⁹·(1 − mask) of attention is 0 at 1, and 60 at its neighbour in float32.
    """
    wide = x.double()
    by = half_ulp * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
    return torch.where(wide == wide.round(), x, (wide + wide * by).to(x.dtype))


def _dtype(model: nn.Module) -> torch.dtype:
    """The floating type most of a model's plain weights and buffers have: angles are wider than what they hold."""
    counts: Counter[torch.dtype] = Counter()
    angles: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, Reparameterized):
            for name, held in layer.held.items():
                counts[held.dtype] += math.prod(held.spec.shape)
                angles.update(id(tensor) for tensor in layer.tensors(name).values())
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in angles:
            counts[tensor.dtype] += tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
