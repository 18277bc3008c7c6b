"""The plain layers that can hold a parameterization: where their units lie, and what mean normalization means there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from reparam.checkpoint import dialects
from reparam.parameterizations import UnitAxis

_ATTENTION = "MultiheadAttention reads this layer's weight and never calls it"
_THREE_INPUTS = "query, key and value each have a mean of their own"
_RECURRENT = "a recurrent layer's pre-activations feed its next step: there is no one mean to subtract"
_SHIFTED = (
    "under a transposed convolution a shift of the input depends on the position: it is no change of bias"
)


@dataclass(frozen=True)
class Kind:
    """What must be known of a plain class besides its parameters' names.

    Attributes:
        spatial: how many axes of input and output follow the channel axis.
        unit: the unit axis of all its weights.
        affine: the layer of its input with given weight and bias; None where the forward pass is more than that.
        autocasts: autocast runs its forward pass in lower precision, so the weight may be composed there.
        no_mn, no_mbn: why mean normalization, or the mini-batch mean, is refused.
    """

    spatial: int = 0
    unit: Callable[[nn.Module], UnitAxis] = lambda module: UnitAxis()
    affine: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor] | None = None
    autocasts: bool = False
    no_mn: str | None = None
    no_mbn: str | None = None

    @property
    def channel(self) -> int:
        """The channel axis of input and output, from the end: batches are optional."""
        return -1 - self.spatial


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _conv(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = layer._conv_forward(x, weight, bias)
    return out


def _conv1d(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def _turned(module: Any) -> UnitAxis:
    return UnitAxis(1, int(module.groups))


_LINEAR = Kind(affine=_linear, autocasts=True)
_ATTENTION_IN = Kind(no_mn=_THREE_INPUTS, no_mbn=_THREE_INPUTS)
_RNN = Kind(no_mbn=_RECURRENT)
HF_CONV1D_CLASS = ("transformers.pytorch_utils", "Conv1D")
#: a linear layer whose weight is (in, out)
HF_CONV1D = replace(_LINEAR, unit=lambda module: UnitAxis(1), affine=_conv1d)


def _convolution(spatial: int) -> Kind:
    return Kind(spatial, affine=_conv, autocasts=True)


def _transposed(spatial: int) -> Kind:
    return Kind(spatial, unit=_turned, autocasts=True, no_mn=_SHIFTED)


#: Classes are matched exactly: a subclass may compute something else.
KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: _LINEAR,
    NonDynamicallyQuantizableLinear: replace(_LINEAR, no_mn=_ATTENTION, no_mbn=_ATTENTION),
    nn.Conv1d: _convolution(1),
    nn.Conv2d: _convolution(2),
    nn.Conv3d: _convolution(3),
    nn.ConvTranspose1d: _transposed(1),
    nn.ConvTranspose2d: _transposed(2),
    nn.ConvTranspose3d: _transposed(3),
    nn.RNN: _RNN,
    nn.LSTM: _RNN,
    nn.GRU: _RNN,
    nn.RNNCell: _RNN,
    nn.LSTMCell: _RNN,
    nn.GRUCell: _RNN,
    nn.MultiheadAttention: _ATTENTION_IN,
}


def kind_of(module: nn.Module) -> Kind | None:
    """What is known of a layer by the class it is of, or derives from; None for a module that is no such layer.

    transformers' ``Conv1D`` is known by its name: transformers itself is not imported.
    """
    for cls in type(module).__mro__:
        if cls in KINDS:
            return KINDS[cls]
        if (cls.__module__, cls.__name__) == HF_CONV1D_CLASS:
            return HF_CONV1D
    return None


def class_name(cls: type[nn.Module]) -> str:
    """A class for a message: torch's name of an attention's output projection says nothing of what it is."""
    name = NonDynamicallyQuantizableLinear.__name__
    return cls.__name__.replace(name, "Linear (the attention's output projection)")


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a plain layer that are weights."""
    return tuple(
        name for name, p in module._parameters.items() if p is not None and dialects.is_weight(name, p.dim())
    )


def bias_name(weight: str) -> str:
    """The name of the bias that belongs to a weight, whether or not there is one."""
    return dialects.bias_key(weight)
