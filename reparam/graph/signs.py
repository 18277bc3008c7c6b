"""Scales that stand after activations, found in a graph, and the places that the signs of negative ones find.

W f(s ∘ y) = (W diag(s)) f(y)     s = ±1 of every unit, W the linear layers that take the result
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from reparam.errors import ReparamError
from reparam.graph.capture import Capture
from reparam.graph.columns import scale_columns
from reparam.graph.passing import HOMOGENEOUS, LINEAR
from reparam.graph.rewritten import Rewritten
from reparam.graph.walk import Consumer, linear_consumers
from reparam.layers import Reparameterized
from reparam.layers.geometric import scale_units


@dataclass(frozen=True)
class Scale:
    """A scale that stands after the activation.

    Attributes:
        name: of its layer.
        layer: the same in the module that was converted.
        batched_only: its layer takes batches alone.
        r: shape (units,).
        dtype: of the layer's weight.
        node: its multiplication.
        channel: the axis of the units there, from the end.
    """

    name: str
    layer: str
    batched_only: bool
    r: Tensor
    dtype: torch.dtype
    node: fx.Node
    channel: int

    @property
    def sign(self) -> Tensor:
        """±1, shape (units,)."""
        return torch.where(self.r < 0, -1.0, 1.0).to(self.dtype)


def find_scale(captured: Capture, name: str, layer: Reparameterized) -> Scale:
    nodes = [n for n in captured.nodes() if n.target is scale_units and scaled_layer(captured, n) is layer]
    if len(nodes) != 1:
        raise misplaced(name)
    r, own = layer.tensors()["r"].detach(), captured.names(layer)[0]
    return Scale(name, own, layer.batched_only, r, layer.held["weight"].dtype, nodes[0], layer.kind.channel)


def misplaced(name: str) -> ReparamError:
    return ReparamError(
        f"`{name}`: its scale stands outside of the layer, but not where this library placed it: fold the model "
        "that `convert` returned by itself, before it becomes part of another"
    )


def scaled_layer(captured: Capture, node: fx.Node) -> nn.Module | None:
    """The layer whose r a multiplication takes, None if it is no layer's before it.

    By where its input comes from: layers with one weight have one r, which the graph shows under one name.
    """
    attribute = str(_attribute(node).target)
    before: fx.Node | None = _data(node)
    while before is not None:
        module = captured.module(before)
        if isinstance(module, Reparameterized):
            parameters = dict(captured.model.named_parameters(remove_duplicate=False))
            taken = module.scale_outside and parameters.get(attribute) is module.tensors()["r"]
            return module if taken else None
        operation = before.target if module is None else type(module)
        before = _data(before) if operation in LINEAR or operation in HOMOGENEOUS else None
    return None


def settle(
    captured: Capture, scales: list[Scale], outside: Collection[int]
) -> tuple[nn.Module, dict[str, str]]:
    """What a folded copy, whose layers hold |r|, still needs: every sign finds its place, in place.

    Args:
        captured: the copy.
        scales: of its layers.
        outside: ids of parameters that are others' too.

    Returns:
        The model, in its own class if no sign remains; and by layer, what was done.
    """
    model, graph = captured.model, captured.graph
    assert isinstance(model, Rewritten)
    assert graph is not None
    settled = {}
    buffers = {}
    for scale in scales:
        if (scale.r < 0).any():
            buffers[scale.layer] = _hold_sign(model, scale)
        else:
            _erase(scale.node)
            settled[scale.name] = "r folded into the layer"
    # Only now no tensor of a layer is read outside of its call.
    for scale in scales:
        if scale.layer not in buffers:
            continue
        units, negative = len(scale.r), int((scale.r < 0).sum())
        consumers = _consumers(captured, scale, outside)
        if isinstance(consumers, str):
            settled[scale.name] = f"{negative} of {units} r negative: one multiplication remains, {consumers}"
            continue
        for consumer in consumers:
            scale_columns(consumer.module, scale.sign, consumer.repeat)
        _erase(scale.node)
        del model._buffers[buffers[scale.layer]]
        into = ", ".join(f"`{consumer.node.target}`" for consumer in consumers)
        settled[scale.name] = f"{negative} of {units} r negative: their signs pushed into {into}"
    remains = any(node.target is scale_units for node in graph.nodes)
    return Rewritten.of(model, graph) if remains else model.restore(), settled


def _consumers(captured: Capture, scale: Scale, outside: Collection[int]) -> list[Consumer] | str:
    """The layers whose columns can take the signs, or why there are others."""
    found = linear_consumers(captured, scale.node, len(scale.r), scale.channel, "signs")
    if isinstance(found, str):
        return found
    for consumer in found:
        if any(id(parameter) in outside for parameter in consumer.module.parameters()):
            return f"`{consumer.node.target}` shares parameters with layers outside"
        if consumer.of_batch and not scale.batched_only:
            return f"`{consumer.node.target}` takes its units behind a flattening that needs a batch"
    return found


def sign_key(layer: str) -> str:
    """The buffer that holds the signs of a layer's units, where they stay."""
    return f"{layer.replace('.', '_')}_sign"


def _hold_sign(model: nn.Module, scale: Scale) -> str:
    """Multiply by a buffer of signs where r was: its name."""
    name = sign_key(scale.layer)
    while hasattr(model, name):
        name += "_"
    model.register_buffer(name, scale.sign)
    r = _attribute(scale.node)
    with scale.node.graph.inserting_before(scale.node):
        scale.node.replace_input_with(r, scale.node.graph.create_node("get_attr", name))
    _erase_unused(r)
    return name


def _erase(node: fx.Node) -> None:
    """Take a multiplication by a scale out of the graph."""
    data, attribute = node.args[0], _attribute(node)
    assert isinstance(data, fx.Node)
    node.replace_all_uses_with(data)
    node.graph.erase_node(node)
    _erase_unused(attribute)


def _erase_unused(attribute: fx.Node) -> None:
    """Tied layers share their r's node too."""
    if not attribute.users:
        attribute.graph.erase_node(attribute)


def _data(node: fx.Node) -> fx.Node | None:
    """What an operation works on, None where that is no result of another."""
    data = node.args[0] if node.args else node.kwargs.get("input")
    return data if isinstance(data, fx.Node) else None


def _attribute(node: fx.Node) -> fx.Node:
    """The tensor a multiplication by a scale takes, as a node."""
    assert isinstance(node.args[1], fx.Node)
    return node.args[1]
