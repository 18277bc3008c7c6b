"""Find layers into which an exporter folded the batch norm that follows them.

    W' = W · s,  b' = (b − μ) · s + β,   s = γ / √(σ² + ε)

W' is proportional to W unit by unit: its factors are ⟨W', W⟩ / ⟨W, W⟩, and the batch norm is the one with that s. A
match is exact, bit for bit; or, from an exporter that rounds in other places, within WITHIN of the largest value of the
tensor, which the map then says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reparam.onnxfile import transforms
from reparam.onnxfile.candidates import same_bits
from reparam.onnxfile.weight_map import Source

if TYPE_CHECKING:
    from reparam.onnxfile.mapping import Held

#: of torch and of Keras, and what MobileNets and EfficientNets use
USUAL_EPS = (1e-5, 1e-3, 1e-6, 1e-4)
#: eight roundings of the type, relative to the largest value
WITHIN = {
    torch.float64: 2.0**-50,
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-5,
}


@dataclass(frozen=True)
class _Norm:
    """A batch norm: its keys by role, and the ε it may have."""

    keys: Mapping[str, str]
    eps: Sequence[float]


def find_folded(
    initializers: Mapping[str, Held],
    state: Mapping[str, Tensor],
    taken: Collection[str],
    eps: Mapping[str, float],
) -> dict[str, Source | tuple[str, ...]]:
    """The sources of those among ``initializers`` that a batch norm was folded into; keys where several fit.

    Args:
        initializers: whose values no tensor of ``state`` has.
        state: floating tensors by key.
        taken: keys that another initializer holds: batch norms that stand in the graph are folded nowhere.
        eps: by the name of the batch norm's module.
    """
    norms = [norm for norm in _norms(state, eps) if norm.keys["running_var"] not in taken]
    found: dict[str, Source | tuple[str, ...]] = {}
    if not norms:
        return found
    vectors = {name: held for name, held in initializers.items() if len(held.shape) == 1}
    for name, held in initializers.items():
        if len(held.shape) < 2 or held.dtype not in WITHIN:
            continue
        source = _find_weight(name, held.tensor(), state, taken, norms)
        if source is None:
            continue
        found[name] = source
        if isinstance(source, Source):
            rest = {name: held for name, held in vectors.items() if name not in found}
            found.update(_find_bias(source, rest, state, norms))
    return found


def _norms(state: Mapping[str, Tensor], eps: Mapping[str, float]) -> Iterator[_Norm]:
    for key in state:
        name, _, last = key.rpartition(".")
        if last != "running_var":
            continue
        prefix = f"{name}." if name else ""
        parts = {"gamma": "weight", "beta": "bias", "running_mean": last.replace("var", "mean")}
        keys = {role: prefix + part for role, part in parts.items() if prefix + part in state}
        yield _Norm({**keys, "running_var": key}, (eps[name],) if name in eps else USUAL_EPS)


def _find_weight(
    name: str, value: Tensor, state: Mapping[str, Tensor], taken: Collection[str], norms: Sequence[_Norm]
) -> Source | tuple[str, ...] | None:
    keys = [key for key, x in state.items() if x.shape == value.shape and key not in taken]
    for key in sorted(keys, key=lambda key: key != name):  # most exporters keep the name
        weight = state[key].to(value.dtype)
        for axis in (0, 1):
            if not _proportional(value[0], weight[0]) and (
                axis == 0 or not _proportional(value[0, 0], weight[0, 0])
            ):
                continue
            sources = [
                _source("batch_norm_weight", {"weight": key}, norm, ("gamma", "running_var"), e, axis=axis)
                for norm in norms
                if _fits(len(state[norm.keys["running_var"]]), value, axis)
                for e in norm.eps
            ]
            if axis == 0:
                sources = _with_these_factors(sources, value, weight, state)
            found = _nearest(sources, value, state)
            if len(found) > 1:
                return tuple(dict.fromkeys(key for source in found for key in source.keys))
            if found:
                return found[0]
    return None


def _proportional(value: Tensor, weight: Tensor) -> bool:
    """Whether one is a multiple of the other: looked at in one unit, before everything is compared."""
    a, b = value.double().flatten(), weight.double().flatten()
    return bool((a @ b) ** 2 >= 0.99 * (a @ a) * (b @ b))


def _fits(units: int, value: Tensor, axis: int) -> bool:
    """Whether a batch norm of so many units can follow a layer whose weight has this shape."""
    if axis == 0:
        return units == len(value)
    return units % value.shape[1] == 0 and len(value) % (units // value.shape[1]) == 0


def _with_these_factors(
    sources: Sequence[Source], value: Tensor, weight: Tensor, state: Mapping[str, Tensor]
) -> list[Source]:
    """Those whose s is what the largest weight of each unit was multiplied by, roughly."""
    largest = weight.flatten(1).abs().argmax(1, keepdim=True)
    old, new = (x.flatten(1).gather(1, largest)[:, 0].double() for x in (weight, value))
    factors = new / torch.where(old == 0, 1.0, old)
    kept = []
    for source in sources:
        tensors = (state[key].to(value.dtype) for key in source.keys)
        named = dict(zip(source.settings["roles"], tensors, strict=True))
        expected = (old != 0) * transforms.batch_norm_scale(named, source.settings["eps"]).double()
        if float((factors - expected).abs().max()) <= 8 * WITHIN[value.dtype] * float(expected.abs().max()):
            kept.append(source)
    return kept


def _find_bias(
    weight: Source, vectors: Mapping[str, Held], state: Mapping[str, Tensor], norms: Sequence[_Norm]
) -> dict[str, Source]:
    """The bias that belongs to a folded weight, by its initializer's name; empty if there is none."""
    roles = dict(zip(weight.settings["roles"], weight.keys, strict=True))
    norm = next(norm for norm in norms if norm.keys["running_var"] == roles["running_var"])
    own = roles["weight"].removesuffix("weight") + "bias"
    bias = {"bias": own} if own in state else {}
    wanted = ("running_mean", "gamma", "running_var", "beta")
    source = _source("batch_norm_bias", bias, norm, wanted, weight.settings["eps"])
    for name, held in vectors.items():
        if held.dtype in WITHIN and held.shape == tuple(state[roles["running_var"]].shape):
            for found in _nearest([source], held.tensor(), state):
                return {name: found}
    return {}


def _source(
    transform: str, own: Mapping[str, str], norm: _Norm, wanted: Sequence[str], eps: float, **settings: Any
) -> Source:
    keys = {**own, **{role: norm.keys[role] for role in wanted if role in norm.keys}}
    return Source(tuple(keys.values()), transform, {"roles": list(keys), "eps": eps, **settings})


def _nearest(sources: Sequence[Source], value: Tensor, state: Mapping[str, Tensor]) -> list[Source]:
    """All that are equal, one of each keys; else all within the tolerance, which their settings then say."""
    equal: dict[tuple[str, ...], Source] = {}  # narrow types cannot tell one small ε from another
    near: dict[tuple[str, ...], tuple[float, Source]] = {}
    largest = float(value.double().abs().max())
    for source in sources:
        found = transforms.apply(source, state, value.dtype)
        if same_bits(found, value):
            equal.setdefault(source.keys, source)
            continue
        apart = float((found.double() - value.double()).abs().max())
        known = near.get(source.keys)
        if apart <= WITHIN[value.dtype] * largest and (known is None or apart < known[0]):
            settings = {**source.settings, "within": WITHIN[value.dtype]}
            near[source.keys] = apart, Source(source.keys, source.transform, settings)
    return list(equal.values()) or [source for _, source in near.values()]
