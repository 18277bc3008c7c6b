"""What an initializer may hold, found by a number that no rearrangement changes.

    fingerprint(x) = Σ bits of every element        of x transposed, reshaped: the same; of x and y joined: their sum

So every tensor of the state_dict is read once, and only those of an initializer's size and fingerprint are compared
with it.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam.onnxfile import transforms
from reparam.onnxfile.transforms import GATES
from reparam.onnxfile.weight_map import Source

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RECURRENT = re.compile(
    r"(?P<prefix>.*?)(?P<what>(?:weight|bias)_[ih]h)(?P<layer>(?:_l\d+)?)(?P<back>(?:_reverse)?)"
)
_STACKED = ("in_proj_weight", "in_proj_bias")
_MATRICES = 3  # of queries, keys and values


def fingerprint(x: Tensor) -> int:
    """The sum of the bits of the elements, read as integers."""
    return int(x.contiguous().reshape(-1).view(_BITS[x.element_size()]).sum(dtype=torch.int64))


@dataclass(frozen=True)
class Recurrent:
    """The keys of one layer of an LSTM, GRU or RNN, those of the backward direction second.

    Attributes:
        gates: 4, 3 or 1.
        keys: "weight_ih", "weight_hh", and with biases "bias_ih", "bias_hh" -> one key or two.
    """

    gates: int
    keys: Mapping[str, tuple[str, ...]]

    def joined(self) -> Iterator[tuple[str, ...]]:
        """The keys of each operand of ONNX's operator."""
        yield self.keys["weight_ih"]
        yield self.keys["weight_hh"]
        if "bias_ih" in self.keys:
            both = zip(self.keys["bias_ih"], self.keys["bias_hh"], strict=True)
            yield tuple(itertools.chain.from_iterable(both))


def recurrent_layers(state: Mapping[str, Tensor]) -> list[Recurrent]:
    """Every layer whose keys are those of torch's recurrent modules and cells."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(state):  # `_reverse` comes after what it is added to
        if match := _RECURRENT.fullmatch(key):
            found[match["prefix"], match["layer"]][match["what"]].append(key)
    layers = []
    for keys in found.values():
        if not {"weight_ih", "weight_hh"} <= keys.keys() or ("bias_ih" in keys) != ("bias_hh" in keys):
            continue
        ih, hh = (state[keys[what][0]] for what in ("weight_ih", "weight_hh"))
        gates = ih.shape[0] // hh.shape[1] if hh.dim() == 2 and hh.shape[1] else 0
        if gates in GATES and len({len(names) for names in keys.values()}) == 1:
            layers.append(Recurrent(gates, {what: tuple(names) for what, names in keys.items()}))
    return layers


class Candidates:
    """The tensors of a state_dict, and what exporters join or cut of them, cast to one element type.

    Args:
        state: plain tensors by key.
        dtype: floating tensors are cast to it.
        sizes: numbers of elements that are asked for; others are not read.
    """

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype, sizes: Iterable[int]) -> None:
        self.state, self.dtype = state, dtype
        wanted = set(sizes)
        self._keys: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._joined: dict[tuple[int, int], list[tuple[Recurrent, tuple[str, ...]]]] = defaultdict(list)
        self._parts: dict[tuple[int, int], list[tuple[str, int, int]]] = defaultdict(list)
        self._sums: dict[tuple[int, int], list[tuple[str, str]]] = defaultdict(list)
        for key, x in state.items():
            if x.numel() in wanted and self.cast(x).dtype == dtype:
                self._keys[x.numel(), fingerprint(self.cast(x))].append(key)
            if key.endswith(_STACKED) and x.numel() // _MATRICES in wanted:
                step = x.shape[0] // _MATRICES
                for start in range(0, step * _MATRICES, step):
                    part = self.cast(x[start : start + step])
                    self._parts[part.numel(), fingerprint(part)].append((key, start, start + step))
        for layer in recurrent_layers(state) if dtype.is_floating_point else []:
            for keys in layer.joined():
                tensors = [self.cast(state[key]) for key in keys]
                size = sum(x.numel() for x in tensors)
                if size in wanted:
                    self._joined[size, sum(map(fingerprint, tensors))].append((layer, keys))
            for ih, hh in zip(layer.keys.get("bias_ih", ()), layer.keys.get("bias_hh", ()), strict=True):
                merged = self.cast(state[ih]) + self.cast(state[hh])
                self._sums[merged.numel(), fingerprint(merged)].append((ih, hh))

    def cast(self, x: Tensor) -> Tensor:
        """As a model that is cast holds it."""
        return x.detach().to(self.dtype) if x.is_floating_point() and self.dtype.is_floating_point else x

    def equal_to(self, value: Tensor) -> list[Source]:
        """All that give exactly these values in this shape, one a key."""
        index = value.numel(), fingerprint(value)
        sources: list[Source | None] = [self._rearranged(key, value) for key in self._keys[index]]
        for layer, keys in self._joined[index]:
            order, shape = list(GATES[layer.gates]), list(value.shape)
            sources.append(self._if_equal(Source(keys, "gates", {"order": order, "shape": shape}), value))
        for key, start, stop in self._parts[index]:
            axes = list(range(self.state[key].dim()))
            for perm in {tuple(axes): axes, tuple(axes[::-1]): axes[::-1]}.values():
                settings = {"start": start, "stop": stop, "perm": perm}
                sources.append(self._if_equal(Source((key,), "rows", settings), value))
        sources += [self._if_equal(Source(keys, "sum"), value) for keys in self._sums[index]]
        return [source for source in sources if source]

    def _rearranged(self, key: str, value: Tensor) -> Source | None:
        x = self.cast(self.state[key])
        if x.shape == value.shape and same_bits(x, value):
            return Source((key,))
        if same_bits(x.reshape(value.shape), value):
            return Source((key,), "reshape", {"shape": list(value.shape)})
        for perm in itertools.permutations(range(x.dim())):
            moved = x.permute(perm)
            if moved.shape == value.shape and same_bits(moved[:1], value[:1]) and same_bits(moved, value):
                return Source((key,), "transpose", {"perm": list(perm)})
        return None

    def _if_equal(self, source: Source, value: Tensor) -> Source | None:
        found = transforms.apply(source, self.state, self.dtype)
        return source if found.shape == value.shape and same_bits(found, value) else None


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one type and shape hold the same bytes, NaN and −0.0 included."""
    kind = _BITS[x.element_size()]
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))
