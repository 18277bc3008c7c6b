"""What a second export, of the same network with other weights, tells of the first.

A weight of one number cannot be told from a constant by its value. In a copy of the network whose weights are all different
it can, and its graph has the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reparam.errors import CheckFailedError
from reparam.export.initializers import Held
from reparam.onnxfile import transforms
from reparam.onnxfile.candidates import same_bits
from reparam.onnxfile.mapping import Found, choose, storage
from reparam.onnxfile.weight_map import Source, WeightMap

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


@dataclass(frozen=True)
class Second:
    """The copy and its export.

    Attributes:
        state: its plain tensors by key.
        held: its floating initializers by name.
    """

    state: Mapping[str, Tensor]
    held: Mapping[str, Held]


def second_export(model: nn.Module, export: Callable[[nn.Module], ONNXProgram]) -> Second | None:
    """Of a copy with other weights; None where those do not suit the network. ``model`` is not changed."""
    other = distinct(model)
    try:
        program = export(other)
    except CheckFailedError:
        return None
    return Second(dict(other.state_dict()), floating(program))


def distinct(model: nn.Module) -> nn.Module:
    """A copy whose floating tensors are all different; variances stay positive."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for value in changed.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator).to(value.dtype))
    return changed


def floating(program: ONNXProgram) -> dict[str, Held]:
    """The floating initializers whose values are known."""
    held = {name: Held(value) for name, value in program.model.graph.initializers.items()}
    return {
        name: x
        for name, x in held.items()
        if x.is_known and x.dtype is not None and x.dtype.is_floating_point
    }


def resolve(
    found: Found,
    held: Mapping[str, Held],
    state: Mapping[str, Tensor],
    used: Collection[str],
    second: Callable[[], Second | None],
) -> Found:
    """``found`` with the initializers that hold single numbers, where a second export tells which.

    Args:
        found: what values and names of the first export say.
        held: its floating initializers.
        state: its plain tensors by key, on the CPU.
        used: keys that it computes with.
        second: makes the second export; called only if there is something to tell.
    """
    single = [
        k for k in found.uncovered if k in used and state[k].is_floating_point() and state[k].numel() == 1
    ]
    if not single or (other := second()) is None:
        return found
    more: dict[str, Source] = {}
    for name, first in held.items():
        if name in found.weights.sources or name not in other.held or torch.Size(first.shape).numel() > 1:
            continue
        both = ((state, first), (other.state, other.held[name]))
        sources = [Source((key,), "reshape", {"shape": list(first.shape)}) for key in single]
        fits = [source for source in sources if all(_holds(x, source, of) for of, x in both)]
        if fits and isinstance(chosen := choose(name, fits, state), Source):
            more[name] = chosen
    shares = {storage(state[key]) for source in more.values() for key in source.keys}
    return replace(
        found,
        weights=WeightMap({**found.weights.sources, **more}),
        uncovered=tuple(key for key in found.uncovered if storage(state[key]) not in shares),
    )


def _holds(held: Held, source: Source, state: Mapping[str, Tensor]) -> bool:
    value = held.tensor()
    made = transforms.apply(source, state, value.dtype)
    return made.shape == value.shape and same_bits(made, value)
