"""Exponential moving average of a model's parameters: a second set of values, for evaluation and for the result.

    average ← average + (1 − d)·(value − average)        d = min(decay, (1 + n)/(10 + n)) at the n-th update, from 0

so that an average over few steps is not all starting point (TensorFlow's rule, timm's and ultralytics' kin). Running
means and variances are averaged like parameters: to first order they are those of the averaged weights. Buffers that
a state_dict leaves out, or that hold integers, stay the model's.

The last angle of GmP runs over the full circle: 3.1 and −3.1 lie 0.08 apart, and their mean is π, not 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reparam.dtypes import torch_dtype
from reparam.errors import CheckpointError
from reparam.kernels.hyperspherical import right_angle
from reparam.layers import Reparameterized


class Average:
    """The averages of one model's parameters and floating-point buffers, in float32 or above.

    Values that do not change are kept bit for bit, so that zeros of pruned weights stay: an angle of fl(π/2) too.

    Args:
        model: on its device already; the averages start at its values.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._updates = 0
        self._values: dict[str, Tensor] = {}
        turns = _half_turns(model)
        for name, tensor in _averaged(model).items():
            value = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            if name in turns:
                start = torch.zeros_like(value[:, -1])
                value[:, -1] = _along_the_circle(start, value[:, -1], 1.0, turns[name])
            self._values[name] = value

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's values, after an optimizer step."""
        weight = 1 - min(self.decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        turns = _half_turns(model)
        for name, tensor in _averaged(model).items():
            average, value = self._values[name], tensor.detach().to(self._values[name].dtype)
            if name in turns:
                average[:, :-1].lerp_(value[:, :-1], weight)
                last = average[:, -1]
                last.copy_(_along_the_circle(last, value[:, -1], weight, turns[name]))
            else:
                # The difference of infinities (masks kept as buffers) is NaN.
                average.copy_(torch.where(average == value, average, average.lerp(value, weight)))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the averages; afterwards its own values again, bit for bit, whatever happened."""
        tensors = _averaged(model)
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            _copy(self._values, tensors)
            yield
        finally:
            _copy(own, _averaged(model))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "values": dict(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            CheckpointError: it is of another model.
        """
        shapes = [
            {k: tuple(v.shape) for k, v in values.items()} for values in (self._values, state["values"])
        ]
        if shapes[0] != shapes[1]:
            odd = sorted(
                name
                for name in shapes[0].keys() | shapes[1].keys()
                if shapes[0].get(name) != shapes[1].get(name)
            )
            raise CheckpointError(f"the saved averages are of another model: `{odd[0]}` differs")
        _copy(state["values"], self._values)
        self._updates = state["updates"]


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the floating-point buffers a state_dict holds; each once."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()}
    return {**dict(model.named_parameters()), **buffers}


def _half_turns(model: nn.Module) -> dict[str, float]:
    """By name, the angles whose last is over the full circle, with π as rounded where they were stored."""
    stored = {
        id(layer.tensors(name)["theta"]): 2 * right_angle(torch_dtype(held.spec.stored))
        for layer in model.modules()
        if isinstance(layer, Reparameterized)
        for name, held in layer.held.items()
        if "theta" in held.roles and held.spec.fan_in > 1
    }
    return {name: stored[id(p)] for name, p in model.named_parameters() if id(p) in stored}


def _along_the_circle(average: Tensor, value: Tensor, weight: float, half: float) -> Tensor:
    """``weight`` of the way from ``average``, in (−half, half], to ``value`` along the shorter arc; in (−half, half].

    A half turn is π as rounded where angles are stored, at which sines are exactly zero: +half and −half are one
    angle, and stay exactly it.
    """
    arc = value - average
    arc = arc - 2 * half * torch.round(arc / (2 * half))
    moved = average + weight * arc
    moved = torch.where(moved > half, moved - 2 * half, moved)
    return torch.where(moved <= -half, moved + 2 * half, moved)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
