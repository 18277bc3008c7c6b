"""Weights composed once for several forward passes without gradients.

Only inside :func:`cached_weights`, which a caller opens around an evaluation. What it keeps lies on the layers and goes
when it ends. Without being asked nothing is kept: a parameter's version counter does not see writes through ``.data``
(which is how many an averaging of weights swaps them), and a weight that is out of date is worse than one composed too
often.

Forward passes with gradients compose as ever there; several of them that make one step may share what they compose in
:func:`reparam.layers.gathering.gathered_gradients`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: composes a weight in a dtype
Compose = Callable[[torch.dtype], Tensor]
_Cache = TypeVar("_Cache", bound="WeightCache")


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights of ``model`` are composed once, and again where their parameters changed.

    For an evaluation::

        with torch.no_grad(), cached_weights(model):
            for inputs, targets in batches:
                loss(model(inputs), targets)

    Costs the memory of all composed weights. While gradients are on, in compiled and exported code, and for swapped-in
    (``functional_call``) parameters they are composed as ever; so are those of modules sharded by FSDP, if ``model`` is
    the whole sharded model and no module taken out of it. Writes through ``.data`` inside the block go unseen.
    """
    with caches(model, WeightCache):
        yield


@contextmanager
def caches(model: nn.Module, make: Callable[[], _Cache]) -> Iterator[list[_Cache]]:
    """Inside, all modules of ``model`` that may have a cache, and have none, have one of their own."""
    sharded = _sharded(model)
    layers = [
        m
        for m in model.modules()
        if isinstance(m, CachesWeights) and m.weight_cache is None and m not in sharded
    ]
    made = [make() for _ in layers]
    for layer, cache in zip(layers, made, strict=True):
        layer.weight_cache = cache
    try:
        yield made
    finally:
        for layer in layers:
            layer.weight_cache = None


class CachesWeights(nn.Module):
    """A module that composes weights, through its ``weight_cache`` where it has one."""

    weight_cache: WeightCache | None = None

    def _once(self, tensors: Sequence[Tensor], how: Hashable, dtype: torch.dtype, compose: Compose) -> Tensor:
        """``compose(dtype)``, or what it gave for the same parameters, unchanged since, and the same ``how``."""
        cache = self.weight_cache
        if cache is None or torch.compiler.is_compiling():
            return compose(dtype)
        # Swapped in by torch.func, sharded, or without a version counter: not this module's own.
        if any(type(t) is not nn.Parameter or t.is_inference() for t in tensors):
            return compose(dtype)
        return cache.weight(tensors, how, dtype, compose)


class Composed:
    """One composed weight, and the parameters and their state when it was composed."""

    def __init__(self, tensors: Sequence[Tensor], weight: Tensor) -> None:
        self.weight = weight
        self.tensors, self._state = tuple(tensors), _state(tensors)
        # Their memory, whose address nobody else gets while it is held.
        self._kept = [t.detach() for t in tensors]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is composed of these, as they are now."""
        same = len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))
        return same and _state(tensors) == self._state


class WeightCache:
    """The weights one module composed since :func:`cached_weights` began. Its copies and pickles are None."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Composed] = {}

    def weight(
        self, tensors: Sequence[Tensor], how: Hashable, dtype: torch.dtype, compose: Compose
    ) -> Tensor:
        """See :meth:`CachesWeights._once`."""
        if torch.is_grad_enabled():
            return compose(dtype)
        # What was composed in inference mode can take no part in a backward pass outside.
        key = how, dtype, torch.is_inference_mode_enabled()
        known = self._entries.get(key)
        if known is None or not known.is_of(tensors):
            known = self._entries[key] = Composed(tensors, compose(dtype))
        return known.weight

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _sharded(model: nn.Module) -> set[nn.Module]:
    """Modules of FSDP: gathered anew, their parameters are the same objects at the same version."""
    if not (dist.is_available() and dist.is_initialized()):
        return set()
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = (FSDPModule, FullyShardedDataParallel)
    return {inner for m in model.modules() if isinstance(m, kinds) for inner in m.modules()}


def _state(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    return [(t._version, t.data_ptr(), t.dtype, t.device) for t in tensors]
