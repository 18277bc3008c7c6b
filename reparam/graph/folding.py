"""Fold every parameterization back into plain weights.

    r·φ(u(θ)ᵀx + λ)          = φ(wᵀx + b)                  w = r·u(θ), b = r·λ; the scale inside, or outside and r ≥ 0
    W f(r ∘ φ(u(θ)ᵀx + λ))   = (W diag(s)) f(φ(wᵀx + b))   s = sign r, w = |r|·u(θ), b = |r|·λ; any r

where W are the linear layers that take the result, through operations f that signs can be moved past: average pooling,
flattening, dropout. A max-pool is none, max(−y) ≠ −max(y); nor is an addition, whose other term lacks the sign. There s
stays: one multiplication, the only trace a fold leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from reparam.checkpoint.dialects import WEIGHT_ROLES
from reparam.errors import ReparamError
from reparam.graph.capture import Capture, capture
from reparam.graph.columns import scale_columns
from reparam.graph.exchange import replace_modules
from reparam.graph.outcome import Outcome
from reparam.graph.rewritten import Rewritten
from reparam.graph.walk import HOMOGENEOUS, LINEAR, linear_consumers
from reparam.layers import Reparameterized
from reparam.layers.geometric import scale_units

RULE = "fold"


def fold(model: nn.Module, report: list[Outcome] | None = None) -> nn.Module:
    """A copy of ``model`` in which every reparameterized layer is a plain layer of its original class again.

    Weights are composed in float64 and rounded once to the layer's dtype. Class and state_dict keys of the result are
    those of the model before it was reparameterized, unless a negative scale stands before what is not linear: its
    signs then stay in a buffer ``<layer>_sign`` of the model ("_" for "."), and so does their multiplication.

    Args:
        model: not changed. In evaluation mode the result computes what it computes.
        report: gains one outcome a layer.

    Raises:
        ReparamError: a layer's scale stands outside of it, and not where this library places scales.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Reparameterized)}
    captured = capture(model) if any(layer.scale_outside for layer in layers.values()) else None
    scales = {
        layer: _find(captured, name, layer)
        for name, layer in layers.items()
        if captured and layer.scale_outside
    }

    first: dict[tuple[object, ...], nn.Parameter] = {}

    def folded(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Reparameterized):
            return None
        scale = scales.get(module)
        plain = module.fold(scale.r.abs() if scale else None)
        _tie(module, plain, first, scale is not None and bool((scale.r < 0).any()))
        return plain

    copy = replace_modules(model, folded)
    settled: dict[str, str] = {}
    if scales:
        assert captured is not None
        assert isinstance(copy, Rewritten)
        # Names are the same in the copy: the graph is one of it as well.
        copy, settled = _settle(Capture(copy, captured.graph), list(scales.values()))
    for name, layer in layers.items():
        why = settled.get(name, f"{type(layer).__name__} folded into {layer.plain_class.__name__}")
        if report is not None:
            report.append(Outcome(RULE, name, True, why))
    return copy


def _tie(
    layer: Reparameterized, plain: nn.Module, first: dict[tuple[object, ...], nn.Parameter], absolute: bool
) -> None:
    """Have ``plain`` share the weights ``layer`` shares, apart from those that hold the absolute value of another r."""
    for name in layer.held:
        weight = plain._parameters[name]
        assert weight is not None
        held = (id(p) for role, p in layer.tensors(name).items() if role in WEIGHT_ROLES)
        plain._parameters[name] = first.setdefault((absolute, *held), weight)
    if isinstance(plain, nn.RNNBase):
        plain._init_flat_weights()


@dataclass(frozen=True)
class _Scale:
    """A scale that stands after the activation.

    Attributes:
        layer: name of its layer.
        r: shape (units,).
        dtype: of the layer's weight.
        node: its multiplication.
        channel: the axis of the units there, from the end.
    """

    layer: str
    r: Tensor
    dtype: torch.dtype
    node: fx.Node
    channel: int

    @property
    def sign(self) -> Tensor:
        """±1, shape (units,)."""
        return torch.where(self.r < 0, -1.0, 1.0).to(self.dtype)


def _find(captured: Capture, name: str, layer: Reparameterized) -> _Scale:
    nodes = [n for n in captured.nodes() if n.target is scale_units and _scaled(captured, n) is layer]
    if not isinstance(captured.model, Rewritten) or len(nodes) != 1:
        raise ReparamError(
            f"`{name}`: its scale stands outside of the layer, but not where this library placed it: fold the model "
            "that `convert` returned by itself, before it becomes part of another"
        )
    r = layer.tensors()["r"].detach()
    return _Scale(name, r, layer.held["weight"].dtype, nodes[0], layer.kind.channel)


def _scaled(captured: Capture, node: fx.Node) -> nn.Module | None:
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


def _settle(captured: Capture, scales: list[_Scale]) -> tuple[nn.Module, dict[str, str]]:
    """What a folded copy, whose layers hold |r|, still needs: every sign finds its place, in place.

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
            settled[scale.layer] = "r folded into the layer"
    # Only now no tensor of a layer is read outside of its call.
    for scale in scales:
        if scale.layer not in buffers:
            continue
        units, negative = len(scale.r), int((scale.r < 0).sum())
        consumers = linear_consumers(captured, scale.node, units, scale.channel, "signs")
        if isinstance(consumers, str):
            settled[scale.layer] = (
                f"{negative} of {units} r negative: one multiplication remains, {consumers}"
            )
            continue
        for consumer in consumers:
            scale_columns(consumer.module, scale.sign, consumer.repeat)
        _erase(scale.node)
        del model._buffers[buffers[scale.layer]]
        into = ", ".join(f"`{consumer.node.target}`" for consumer in consumers)
        settled[scale.layer] = f"{negative} of {units} r negative: their signs pushed into {into}"
    remains = any(node.target is scale_units for node in graph.nodes)
    return Rewritten.of(model, graph) if remains else model.restore(), settled


def _hold_sign(model: nn.Module, scale: _Scale) -> str:
    """Multiply by a buffer of signs where r was: its name."""
    name = f"{scale.layer.replace('.', '_')}_sign"
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
