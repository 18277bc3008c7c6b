"""Find out which weight every initializer of an ONNX file holds, by its values.

Names are followed only among tensors that are equal: exporters reuse a name for other values, and foreign files have
names of their own. What several tensors could be is said to be ambiguous, never guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reparam.onnxfile.candidates import Candidates
from reparam.onnxfile.folded_norms import find_folded
from reparam.onnxfile.weight_map import Source, WeightMap


class Held(Protocol):
    """An initializer: of a file, or of a graph in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype | None: ...

    def tensor(self) -> Tensor:
        """The values."""


@dataclass(frozen=True)
class Found:
    """What the initializers hold.

    Attributes:
        weights: the map.
        ambiguous: initializer -> the keys it may come from, whose values are equal and whose names do not tell.
        unknown: floating initializers of more than one element that hold no tensor of the state_dict: constants, or
            something that was computed from weights in a way that is not known here.
        uncovered: keys that no initializer holds, empty tensors aside.
    """

    weights: WeightMap
    ambiguous: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...]
    uncovered: tuple[str, ...]


def find_map(
    initializers: Mapping[str, Held], state: Mapping[str, Tensor], eps: Mapping[str, float] | None = None
) -> Found:
    """Match initializers with the tensors of the plain state_dict their file was exported from.

    Equal means every bit, after a cast to the initializer's type. Only a batch norm folded into the layer before it may
    differ by rounding, see :mod:`reparam.onnxfile.folded_norms`. Scalars and integers count as weights only under their
    own name: a 1 is equal to many.

    Args:
        initializers: by name; read one at a time.
        state: plain tensors by key, on the CPU.
        eps: of batch norms, by the name of their module; usual ones are tried for the others.
    """
    sources: dict[str, Source] = {}
    ambiguous: dict[str, tuple[str, ...]] = {}
    left: list[str] = []
    for dtype, names in _by_dtype(initializers, state).items():
        sizes = {torch.Size(initializers[name].shape).numel() for name in names}
        candidates = Candidates(state, dtype, sizes)
        for name in names:
            value = initializers[name].tensor()
            found = choose(name, candidates.equal_to(value), state)
            named_only = value.numel() == 1 or not dtype.is_floating_point
            if isinstance(found, Source):
                if not named_only or found.keys == (name,):
                    sources[name] = found
            elif named_only:
                continue
            elif found:
                ambiguous[name] = found
            else:
                left.append(name)
    floating = {key: x for key, x in state.items() if x.is_floating_point()}
    taken = {key for source in sources.values() for key in source.keys}
    folded = find_folded({name: initializers[name] for name in left}, floating, taken, eps or {})
    for name, source in folded.items():
        if isinstance(source, Source):
            sources[name] = source
        else:
            ambiguous[name] = source
    covered = {key for source in sources.values() for key in source.keys}
    shares = {storage(state[key]) for key in covered}  # tied keys are held under one name
    return Found(
        WeightMap(sources),
        ambiguous,
        tuple(name for name in left if name not in folded),
        tuple(key for key, x in state.items() if x.numel() and storage(x) not in shares),
    )


def _by_dtype(
    initializers: Mapping[str, Held], state: Mapping[str, Tensor]
) -> dict[torch.dtype, Sequence[str]]:
    """Names of those that may hold weights."""
    found: dict[torch.dtype, list[str]] = defaultdict(list)
    for name, held in initializers.items():
        if held.dtype is None or 0 in held.shape:
            continue
        single = torch.Size(held.shape).numel() == 1
        if name in state or (held.dtype.is_floating_point and not single):
            found[held.dtype].append(name)
    return dict(found)


def choose(name: str, sources: Sequence[Source], state: Mapping[str, Tensor]) -> Source | tuple[str, ...]:
    """The one source, or the one whose name tells; else the keys, none or several."""
    if len(sources) > 1:
        best = max(_likeness(name, source) for source in sources)
        sources = [source for source in sources if _likeness(name, source) == best]
    if len({tuple(storage(state[key]) for key in source.keys) for source in sources}) == 1:
        return sources[0]
    return tuple(dict.fromkeys(key for source in sources for key in source.keys))


def _likeness(name: str, source: Source) -> int:
    """How many parts the name and the key share, counted from the end."""
    if len(source.keys) > 1:
        return 0
    own, key = name.split("."), source.keys[0].split(".")
    alike = 0
    while alike < min(len(own), len(key)) and own[-1 - alike] == key[-1 - alike]:
        alike += 1
    return alike + (own == key)


def storage(x: Tensor) -> object:
    """Equal for tensors that are tied: the same elements in the same memory."""
    return x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.dtype
