"""Mean normalizations of a layer, both exactly foldable into its bias.

    MN   φ(wᵀ(x − E[x]) + b)        = φ(wᵀx + (b − Σ w·E[x]))     Chen & Ge, eq. 11: the mean per input channel
    MBN  φ(wᵀx − E[wᵀx] + b)                                      Salimans & Kingma §2.3: the mean per unit

The mean of MN is subtracted *after* zero padding, conv(pad(x) − μ) = conv(x) − Σ w·μ: a change of bias, exact for every
stride, dilation, group and padding mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from reparam.dtypes import code_of
from reparam.errors import ReparamError
from reparam.layers.batch_mean import batch_mean

if TYPE_CHECKING:
    from reparam.layers.base import Reparameterized

#: the running mean's name in the state_dict
BUFFERS = {"mn": "running_input_mean", "mbn": "running_mean"}


@dataclass(frozen=True)
class MeanNorm:
    """One mean normalization.

    While training the mean of the mini-batch, over batch, space and the processes it is spread over, is subtracted,
    with gradient through it, and a running mean follows it; in evaluation mode the running mean takes its place.

    Attributes:
        kind: "mn" subtracts the mean of every input channel, "mbn" that of every unit's pre-activation.
        momentum: torch's convention: running ← (1 − momentum)·running + momentum·mean.
    """

    kind: str
    momentum: float = 0.01

    @property
    def buffer(self) -> str:
        return BUFFERS[self.kind]


def insert_mean(layer: Reparameterized, mean: MeanNorm) -> None:
    """See :meth:`Reparameterized.normalize_mean`."""
    if mean.kind not in BUFFERS:
        raise ReparamError(f"unknown mean normalization '{mean.kind}': one of {', '.join(BUFFERS)}")
    names = input_weights(layer)
    reason = _refusal(layer, mean, names)
    if reason is not None:
        what = "mean normalization" if mean.kind == "mn" else "the mini-batch mean"
        raise ReparamError(f"{what} of {layer.plain_class.__name__}: {reason}")
    for name in names:
        if layer.held[name].bias_role is None:
            gain_bias(layer, name)
    held = layer.held[names[0]]
    unit, shape = held.spec.unit, held.spec.shape
    inputs = shape[0] if unit.axis == 1 else shape[1] * _groups(layer)
    dtype = torch.promote_types(held.dtype, torch.float32)
    device = next(iter(layer.tensors(names[0]).values())).device
    width = inputs if mean.kind == "mn" else held.spec.units
    layer.register_buffer(mean.buffer, torch.zeros(width, dtype=dtype, device=device))
    layer.mean = mean


def normalized_forward(layer: Reparameterized, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer's output under its mean normalization; ``plain`` is its forward pass without."""
    args, kwargs = input_first(layer, args, kwargs)
    x, args = args[0], args[1:]
    mean, axis, affine = layer.mean, layer.kind.channel, layer.kind.affine
    assert mean is not None
    if mean.kind == "mbn":
        out = plain(x, *args, **kwargs)
        if not layer.training:
            return out  # with the running mean in its bias
        bias = layer.composed_bias()
        assert bias is not None
        shift = batch_mean(out, axis) - bias
        _follow(layer, mean, shift)
        return out - shift.to(out.dtype).reshape(-1, *(1,) * layer.kind.spatial)
    if affine is None:
        if not layer.training:
            return plain(x, *args, **kwargs)
        # No padding: subtracting from the input is the same change of bias.
        data = x.data if isinstance(x, PackedSequence) else x
        batch = batch_mean(data, axis)
        _follow(layer, mean, batch)
        data = data - batch.to(data.dtype)
        return plain(x._replace(data=data) if isinstance(x, PackedSequence) else data, *args, **kwargs)
    if layer.training:
        batch = batch_mean(x, axis)
        _follow(layer, mean, batch)
    else:
        batch = running_mean(layer)
    weight, bias = layer.composed(), layer.own_bias()
    assert bias is not None
    return affine(layer, x, weight, (bias - _projected(layer, weight, batch)).to(weight.dtype))


def input_first(
    layer: Reparameterized, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, such that the first is its input, which may have been given by name."""
    if args:
        return args, kwargs
    bound = inspect.signature(layer.plain_class.forward).bind(layer, **kwargs)
    return bound.args[1:], bound.kwargs


def running_mean(layer: Reparameterized) -> Tensor:
    """The running mean of a layer that has one."""
    assert layer.mean is not None
    buffer = layer._buffers[layer.mean.buffer]
    assert buffer is not None
    return buffer


def evaluation_bias(layer: Reparameterized, name: str, bias: Tensor) -> Tensor:
    """The bias of one weight with the running mean folded in, in float64 or the dtype of ``bias``."""
    if layer.mean is None or name not in input_weights(layer):
        return bias
    if layer.mean.kind == "mbn":
        return (bias - running_mean(layer)).to(bias.dtype)
    held = layer.held[name]
    weight = layer.form.weight(layer.tensors(name), held.spec, held.dtype, layer.scale_outside)
    return (bias - _projected(layer, weight, running_mean(layer))).to(bias.dtype)


def folded(layer: Reparameterized, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one weight in float64, the running mean in the bias (as stored where nothing is folded)."""
    tensors: dict[str, Tensor] = dict(layer.tensors(name))
    spec = layer.held[name].spec
    if layer.scale_outside:
        tensors["r"] = torch.ones_like(tensors["r"])
    weight, bias = layer.form.compose(tensors, spec)
    if layer.mean is None or bias is None or name not in input_weights(layer):
        return weight, bias
    mean = running_mean(layer).double()
    return weight, bias.double() - (mean if layer.mean.kind == "mbn" else _projected(layer, weight, mean))


@torch.no_grad()
def set_mean(layer: Reparameterized, mean: Tensor) -> None:
    """See :meth:`Reparameterized.set_mean`."""
    if layer.mean is None:
        raise ReparamError("this layer does not normalize a mean: call normalize_mean first")
    running = running_mean(layer)
    if mean.shape != running.shape:
        raise ReparamError(f"a mean of shape {list(mean.shape)}, where the layer has {list(running.shape)}")
    before = running.to(torch.float64, copy=True)
    running.copy_(mean)
    change = running.double() - before
    for name in input_weights(layer):
        tensors, held = layer.tensors(name), layer.held[name]
        assert held.bias_role is not None
        bias, of_units = tensors[held.bias_role], held.bias_role == "lambda_"
        if layer.mean.kind == "mn":
            # λ is the bias of unit rows.
            weight = layer.form.weight(tensors, held.spec, torch.float64, of_units or layer.scale_outside)
            step = _projected(layer, weight, change)
        elif of_units and not layer.scale_outside:
            step = torch.where(change == 0, 0.0, change / tensors["r"].double())
        else:
            step = change
        bias.copy_(bias.double() + step)


def _refusal(layer: Reparameterized, mean: MeanNorm, names: list[str]) -> str | None:
    reason = layer.kind.no_mn if mean.kind == "mn" else layer.kind.no_mbn
    if layer.mean is not None:
        return "its mean is normalized already"
    if reason is None and not names:
        return "the weight that takes its input is not reparameterized"
    recurrent = layer.kind.affine is None and mean.kind == "mn"
    if reason is None and recurrent and any(layer.held[name].bias_role is None for name in names):
        return "it has no bias, and a recurrent layer cannot gain one: build it with bias=True"
    return reason


def input_weights(layer: Reparameterized) -> list[str]:
    """The weights that take the layer's own input."""
    return [n for n in layer.held if n in ("weight", "weight_ih") or n.startswith("weight_ih_l0")]


def gain_bias(layer: Reparameterized, name: str) -> None:
    """Give a weight without bias one of zeros, trained if the weight is."""
    held, tensors = layer.held[name], layer.tensors(name)
    role = "lambda_" if layer.form.name == "gmp" else "bias"
    wide = next(iter(tensors.values()))
    held.spec = replace(held.spec, bias_shape=(held.spec.units,), bias_dtype=code_of(held.dtype))
    held.bias_role, held.roles = role, (*held.roles, role)
    dtype = wide.dtype if role == "lambda_" else held.dtype
    zeros = torch.zeros(held.spec.units, dtype=dtype, device=wide.device)
    layer._parameters.pop(held.bias_name, None)
    layer._parameters[role] = nn.Parameter(
        zeros, requires_grad=any(t.requires_grad for t in tensors.values())
    )
    layer.gained_bias = True


def project(weight: Tensor, mean: Tensor, groups: int, axis: int) -> Tensor:
    """Σ w·μ of every unit, shape (units,), in the wider dtype of the two: what a constant input of μ adds.

    Args:
        weight: (units, channels / groups, *space); (channels, units) where ``axis``, that of the units, is 1.
        mean: μ, (channels,).
    """
    weight = weight.to(torch.promote_types(weight.dtype, mean.dtype))
    mean = mean.to(weight.dtype)
    if weight.dim() == 2 and axis == 1:
        return mean @ weight
    summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    blocks = summed.reshape(groups, -1, summed.shape[1])
    return (blocks @ mean.reshape(groups, -1, 1)).reshape(-1)


def _projected(layer: Reparameterized, weight: Tensor, mean: Tensor) -> Tensor:
    return project(weight, mean, _groups(layer), layer.kind.unit(layer).axis)


def _follow(layer: Reparameterized, mean: MeanNorm, batch: Tensor) -> None:
    running = running_mean(layer)
    with torch.no_grad():
        running.lerp_(batch.detach().to(running.dtype), mean.momentum)


def _groups(layer: Reparameterized) -> int:
    return int(getattr(layer, "groups", 1))
