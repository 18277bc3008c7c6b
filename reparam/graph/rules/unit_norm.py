"""Bring in unit norm, each layer's scale pushed on to the layers that consume it.

    W φ(Vx + b)  =  (W diag(s)) φ((V/s)x + b/s),     s = ‖v‖ + ε of every unit

for a positively homogeneous φ, and through pooling, dropout and flattening (source: the unit-norm blog). Layers are taken
in the order they run: each gets its scale from before, passes its own on, and is then exchanged. The last layer of a
chain stays plain, since nothing takes its scale.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.graph.capture import Capture, capture
from reparam.graph.columns import linear_kind, scaled_columns
from reparam.graph.inplace import become, fixed, named, named_layers
from reparam.graph.outcome import Outcome
from reparam.graph.walk import Consumer, linear_consumers, require_batches
from reparam.layers import Reparameterized, layer_class
from reparam.layers.unit_norm import UnitNormForm

RULE = "unit norm"


def unit_norms(model: nn.Module, names: Collection[str]) -> list[Outcome]:
    """Bring layers into unit norm, in place; in evaluation and in training the network computes what it did.

    Only for linear layers (Linear, Conv1-3d, ConvTranspose1-3d, HF ``Conv1D``) whose output goes nowhere but to such
    layers. The consumers' weights are multiplied in float64 and rounded once to their dtype, frozen ones too.

    Args:
        model: changed in place; the caller changes a copy of the user's.
        names: of the layers, as in ``named_modules``; one under two names is one.

    Returns:
        One outcome a layer, in the order they run, those never called last. A single one for the whole model (named
        "") if its graph is not known.

    Raises:
        ReparamError: the model has no module of a name.
        NonFiniteError: a weight is NaN or Inf.
    """
    chosen = named_layers(model, names)
    captured = capture(model)
    if captured.untraceable is not None:
        return [Outcome(RULE, "", False, captured.untraceable)]
    called = [module for node in captured.nodes() if (module := captured.module(node)) in chosen]
    order = dict.fromkeys([*called, *chosen])
    outcomes = [Outcome(RULE, captured.names(m)[0], *_bring_in(captured, m)) for m in order if m is not None]
    require_batches(captured)
    return outcomes


@torch.no_grad()
def _bring_in(captured: Capture, layer: nn.Module) -> tuple[bool, str]:
    consumers = _consumers(captured, layer)
    if isinstance(consumers, str):
        return False, consumers
    cls = layer_class("unit", type(layer))
    assert cls is not None
    try:
        unit = cls.from_plain(layer)
    except ReparamError as error:
        raise type(error)(f"{named(captured, layer)}: {error}") from error
    assert isinstance(unit.form, UnitNormForm)
    scale = unit.form.pushed_scale(unit.tensors()["weight_v"], unit.record().spec)
    pushed = [_rounded(consumer, scale) for consumer in consumers]
    if not all(t.isfinite().all() for t in (*unit.tensors().values(), *pushed)):
        return False, "with its scale moved on, values are not finite in the layers' dtype"
    for consumer, weight in zip(consumers, pushed, strict=True):
        assert isinstance(consumer.module.weight, nn.Parameter)
        consumer.module.weight.copy_(weight)
    become(layer, unit)
    return True, f"scale pushed into {', '.join(_told(captured, c.module) for c in consumers)}"


def _consumers(captured: Capture, layer: nn.Module) -> list[Consumer] | str:
    """The plain layers that can take the scale of ``layer``, or why it cannot be moved on."""
    if isinstance(layer, Reparameterized):
        return f"it is in the {layer.form.name} parameterization already"
    reason = fixed(captured, layer)
    if reason is not None:
        return reason
    kind = linear_kind(layer)
    if kind is None:
        return f"{type(layer).__name__} is not a linear layer"
    if layer._forward_hooks:
        return "its forward hooks take or change values that would be divided: remove them first"
    assert isinstance(layer.weight, Tensor)
    units = kind.unit(layer).units(tuple(layer.weight.shape))
    (call,) = captured.calls(layer)
    consumers = linear_consumers(captured, call, units, kind.channel, "positive scales")
    if isinstance(consumers, str):
        return consumers
    for consumer in consumers:
        if isinstance(consumer.module, Reparameterized):
            return (
                f"`{consumer.node.target}` is in the {consumer.module.form.name} parameterization already: "
                "bring in unit norm first"
            )
    return consumers


def _rounded(consumer: Consumer, scale: Tensor) -> Tensor:
    assert isinstance(consumer.module.weight, Tensor)
    return scaled_columns(consumer.module, scale, consumer.repeat).to(consumer.module.weight.dtype)


def _told(captured: Capture, module: nn.Module) -> str:
    assert isinstance(module.weight, Tensor)
    return f"`{captured.names(module)[0]}`{'' if module.weight.requires_grad else ' (frozen)'}"
