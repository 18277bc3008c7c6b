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

from reparam.layers.caching import Compose, Composed, WeightCache, caches


@contextmanager
def gathered_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, weights of ``model`` are composed once; their gradients reach the parameters when the block ends.

    For a step in parts::

        with gathered_gradients(model):
            for inputs, targets in parts:
                loss(model(inputs), targets).backward()
        optimizer.step()

    All backward passes have to be inside. Not for DistributedDataParallel, which waits for the parameters' gradients
    within each backward pass. Compiled code and passes without gradients compose as ever, and so does a layer whose
    parameters changed inside the block. If the block raises, what was gathered is dropped. Costs the memory of all composed
    weights and of their gradients.
    """
    with caches(model, _Gathering) as made:
        yield
        used = [one for gathering in made for one in gathering.gathered.values() if one.leaf.grad is not None]
        if used:
            torch.autograd.backward([one.weight for one in used], [one.leaf.grad for one in used])


class _Gathered(Composed):
    """A composed weight with its graph, and the leaf that stands for it, on which gradients are summed."""

    def __init__(self, tensors: Sequence[Tensor], weight: Tensor) -> None:
        super().__init__(tensors, weight)
        self.leaf = weight.detach().requires_grad_(weight.requires_grad)


class _Gathering(WeightCache):
    """The weights one module composed since :func:`gathered_gradients` began."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: dict[Hashable, _Gathered] = {}

    def weight(
        self, tensors: Sequence[Tensor], how: Hashable, dtype: torch.dtype, compose: Compose
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return compose(dtype)
        if how not in self.gathered:
            wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors), dtype)
            # Activation checkpointing counts what is saved, and would miss this when it runs a region again.
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                self.gathered[how] = _Gathered(tensors, compose(wide))
        entry = self.gathered[how]
        return entry.leaf.to(dtype) if entry.is_of(tensors) else compose(dtype)
