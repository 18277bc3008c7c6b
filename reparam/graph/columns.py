"""The input columns of a linear layer: W diag(s) x = W (s ∘ x).

| layer | weight | input channel |
|---|---|---|
| Linear | (out, in) | axis 1 |
| Conv1-3d | (out, in/groups, ...) | axis 1, within each group of axis 0 |
| ConvTranspose1-3d, HF Conv1D | (in, ...) | axis 0 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.layers import Reparameterized, layer_class
from reparam.layers.kinds import Kind


def linear_kind(module: nn.Module) -> Kind | None:
    """The kind of a layer, plain or reparameterized, that is affine in its one input; None for any other module."""
    plain = module.plain_class if isinstance(module, Reparameterized) else type(module)
    cls = layer_class("gmp", plain)
    if cls is None or (cls.kind.affine is None and cls.kind.spatial == 0):
        return None
    return cls.kind


def input_channels(module: nn.Module) -> int:
    """How many input channels (features) a layer with a :func:`linear_kind` has."""
    kind = linear_kind(module)
    assert kind is not None
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kind.unit(module).axis == 1:
        return weight.shape[0]
    return weight.shape[1] * int(getattr(module, "groups", 1))


def scaled_columns(module: nn.Module, scale: Tensor, repeat: int = 1) -> Tensor:
    """The weight of a plain layer whose every input channel is multiplied by a number, in float64.

    Args:
        module: a plain layer with a :func:`linear_kind`; not changed.
        scale: one number for each unit that feeds it, shape (units,).
        repeat: how many consecutive input channels each unit feeds.

    Returns:
        A tensor of the weight's shape.
    """
    kind = linear_kind(module)
    assert kind is not None
    assert not isinstance(module, Reparameterized)
    assert isinstance(module.weight, nn.Parameter)
    weight = module.weight.detach().double()
    columns = scale.to(weight).repeat_interleave(repeat)
    assert columns.shape == (input_channels(module),)
    if kind.unit(module).axis == 1:
        return weight * columns.reshape(-1, *(1,) * (weight.dim() - 1))
    groups = int(getattr(module, "groups", 1))
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (blocks * columns.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))).reshape(weight.shape)


@torch.no_grad()
def scale_columns(module: nn.Module, scale: Tensor, repeat: int = 1) -> None:
    """Multiply the input channels of a plain layer in place, in float64 and rounded once: :func:`scaled_columns`."""
    assert isinstance(module.weight, nn.Parameter)
    module.weight.copy_(scaled_columns(module, scale, repeat))
