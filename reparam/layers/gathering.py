"""Weights composed once for all forward and backward passes that make one optimizer step.

A step may be computed in parts (gradient accumulation), between which no parameter changes. Each weight is then composed
once, in the widest of its parameters' dtypes; the parts use it as a leaf, cast to what each asks for, and the gradients
that arrive there are summed in that widest dtype. When the block ends, one backward pass through the composition brings
the sums to the parameters. The map and its gradient run once a step, not once a part.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from reparam.errors import ReparamError
from reparam.layers.caching import Compose, Composed, WeightCache, caches


@contextmanager
def gathered_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, weights of ``model`` are composed once; their gradients reach the parameters when the block ends.

    For a step in parts::

        with gathered_gradients(model):
            for inputs, targets in parts:
                loss(model(inputs), targets).backward()
        optimizer.step()

    All backward passes of what ran inside have to be inside, and clipping, unscaling and ``zero_grad`` outside: parameters
    have no gradient of a composed weight before the end, and their hooks see the sum. Not for DistributedDataParallel, which
    waits for the parameters' gradients within each backward pass, nor for torch.func's transforms. Compiled code and passes
    without gradients compose as ever, and so does a layer whose parameters changed inside the block before it was used.
    Writes through ``.data`` go unseen. If the block raises, what was gathered is dropped. Costs the memory of all composed
    weights and of their gradients.

    Raises:
        ReparamError: parameters changed, or were frozen or freed, between a backward pass and the end; or a backward pass
            came after the end.
    """
    with caches(model, _Gathering) as made:
        yield
        used = [entry for gathering in made for entry in gathering.close() if entry.leaf.grad is not None]
        if any(not entry.unchanged() for entry in used):
            raise ReparamError(
                "gathered_gradients: parameters changed between a backward pass and the end of the block"
            )
        if used:
            torch.autograd.backward([entry.weight for entry in used], [entry.leaf.grad for entry in used])


class _Gathered(Composed):
    """A composed weight with its graph, and the leaf that stands for it, on which gradients are summed."""

    def __init__(self, tensors: Sequence[Tensor], weight: Tensor) -> None:
        super().__init__(tensors, weight)
        self.leaf = weight.detach().requires_grad_(weight.requires_grad)
        self._trained = [t.requires_grad for t in tensors]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        return super().is_of(tensors) and [t.requires_grad for t in tensors] == self._trained

    def unchanged(self) -> bool:
        """Whether its own parameters are still as they were."""
        return self.is_of(self.tensors)


class _Gathering(WeightCache):
    """The weights one module composed since :func:`gathered_gradients` began."""

    def __init__(self) -> None:
        super().__init__()
        self._gathered: dict[Hashable, _Gathered] = {}
        self._open = True

    def close(self) -> list[_Gathered]:
        """What was gathered; no gradient that comes later can get where it should."""
        self._open = False
        entries = list(self._gathered.values())
        for entry in entries:
            if entry.leaf.requires_grad:
                entry.leaf.register_hook(_refuse)  # type: ignore[no-untyped-call]
        return entries

    def weight(
        self, tensors: Sequence[Tensor], how: Hashable, dtype: torch.dtype, compose: Compose
    ) -> Tensor:
        if not (self._open and torch.is_grad_enabled()):
            return compose(dtype)
        if how not in self._gathered:
            wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors), dtype)
            # Activation checkpointing counts what is saved, and would miss this when it runs a region again.
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                self._gathered[how] = _Gathered(tensors, compose(wide))
        entry = self._gathered[how]
        return entry.leaf.to(dtype) if entry.is_of(tensors) else compose(dtype)


def _refuse(grad: Tensor) -> Tensor:
    raise ReparamError("gathered_gradients: a backward pass after the block, of what ran inside it")
