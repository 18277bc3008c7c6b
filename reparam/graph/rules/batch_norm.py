"""Fold batch normalization into the layer before it (Chen & Ge, eq. 13-15).

    γ·(wᵀx + b − μ)/√(σ² + ε) + β  =  w'ᵀx + b',     w' = w·γ/√(σ² + ε)     b' = (b − μ)·γ/√(σ² + ε) + β

γ, β, μ, σ² of the unit w computes. The layer gains a bias if it had none, and an identity takes the place of the batch
norm, so names and forward code stay. This is its evaluation semantics: μ and σ² are the running statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from reparam.graph.capture import Capture, capture
from reparam.graph.columns import linear_kind
from reparam.graph.inplace import become, fixed, named
from reparam.graph.outcome import Outcome
from reparam.graph.walk import describe, takes_no_values
from reparam.layers import Reparameterized

RULE = "fold batch norm"

#: by how many axes of space the layer before it has
_CLASSES: dict[int, tuple[type[nn.Module], ...]] = {
    0: (nn.BatchNorm1d, nn.SyncBatchNorm),
    1: (nn.BatchNorm1d, nn.SyncBatchNorm),
    2: (nn.BatchNorm2d, nn.SyncBatchNorm),
    3: (nn.BatchNorm3d, nn.SyncBatchNorm),
}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class FoldedBatchNorm(nn.Identity):
    """Where a batch norm was before it was folded into the layer of the name ``into``; a graph does not show it."""

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into

    def extra_repr(self) -> str:
        return f"into={self.into!r}"


def fold_batch_norms(model: nn.Module) -> list[Outcome]:
    """Fold every batch norm that can be, in place.

    BatchNorm1-3d and SyncBatchNorm after Linear, Conv1-3d and ConvTranspose1-3d, grouped or not, with or without
    affine values. Weights are computed in float64 and rounded once to the layer's dtype; each keeps its memory format
    and whether it is trained, and a gained bias is trained if β was (without affine values, if the weight is).

    BatchNorm1d after Linear is taken to see (N, C). It would normalize the other axis of (N, L, C); there the sizes
    tell, unless L = C.

    Args:
        model: changed in place; the caller puts it in evaluation mode, and changes a copy of the user's.

    Returns:
        One outcome a batch norm, in the order they run: of the layer it was folded into, or of the batch norm that
        was left alone. A single one for the whole model (named "") if its graph is not known.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return []
    captured = capture(model)
    if captured.untraceable is not None:
        return [Outcome(RULE, "", False, captured.untraceable)]
    order = [captured.module(node) for node in captured.nodes()]
    norms.sort(key=lambda norm: order.index(norm) if norm in order else len(order))
    return [_fold(captured, norm) for norm in norms]


def _fold(captured: Capture, norm: _BatchNorm) -> Outcome:
    name = captured.names(norm)[0]
    layer = _layer_before(captured, norm)
    if isinstance(layer, str):
        return Outcome(RULE, name, False, layer)
    weight, bias = _folded(layer, norm)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        why = f"folded into {named(captured, layer)} it gives values that are not finite in {weight.dtype}"
        return Outcome(RULE, name, False, why)
    done = f"`{name}` folded in"
    with torch.no_grad():
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight.copy_(weight)
        if isinstance(layer.bias, nn.Parameter):
            layer.bias.copy_(bias)
        else:
            done += ", gained a bias"
            decides = layer.weight if norm.bias is None else norm.bias
            layer.bias = nn.Parameter(bias, requires_grad=decides.requires_grad)
    if norm.training:
        done += ", evaluation statistics used"
    into = captured.names(layer)[0]
    become(norm, FoldedBatchNorm(into).train(norm.training))
    return Outcome(RULE, into, True, done)


def _layer_before(captured: Capture, norm: _BatchNorm) -> nn.Module | str:
    """The layer a batch norm can be folded into, or why there is none."""
    if type(norm) not in {cls for classes in _CLASSES.values() for cls in classes}:
        return f"{type(norm).__name__} is not one of torch's own batch norms: it may compute something else"
    reason = fixed(captured, norm)
    if reason is not None:
        return reason
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: it computes those of the batch in evaluation too"
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return "it has hooks, which would be lost: remove them first"
    path = [*captured.calls(norm)]
    node = _input(path[-1])
    while node is not None and _is_identity(captured.module(node)):
        path.append(node)
        node = _input(node)
    if node is None:
        return "it follows no layer"
    layer, what = captured.module(node), describe(captured, node)
    if isinstance(layer, _DROPOUT):
        return f"dropout {what} stands between it and the layer before"
    if layer is None or (linear_kind(layer) is None and not is_parametrized(layer)):
        return f"it follows {what}, no layer it could be folded into"
    for user in (user for step in (*path[1:], node) for user in captured.consumers(step)):
        if user not in path and not takes_no_values(user):
            return f"the output of {what} is also taken by {describe(captured, user)}"
    return _unfit(captured, layer, norm) or layer


def _unfit(captured: Capture, layer: nn.Module, norm: _BatchNorm) -> str | None:
    """Why a batch norm cannot be folded into the layer whose output only it takes."""
    name, kind = named(captured, layer), linear_kind(layer)
    reason = fixed(captured, layer)
    if reason is not None:
        return reason
    assert kind is not None
    if isinstance(layer, Reparameterized):
        return f"{name} is reparameterized already: fold batch norm first"
    if layer._forward_hooks:
        return f"forward hooks of {name} may take or change what it computes before batch norm: remove them first"
    units = kind.unit(layer).units(tuple(_weight(layer).shape))
    if type(norm) not in _CLASSES[kind.spatial] or norm.num_features != units:
        return (
            f"{type(norm).__name__}({norm.num_features}) does not normalize the {units} units of {name} "
            f"({type(layer).__name__})"
        )
    return None


@torch.no_grad()
def _folded(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """w' and b' in the layer's dtype."""
    kind, weight = linear_kind(layer), _weight(layer)
    assert kind is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double()
    if isinstance(layer.bias, Tensor):
        bias = bias + layer.bias.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    unit, shape = kind.unit(layer), tuple(weight.shape)
    rows = unit.to_rows(weight.double()) * scale[:, None]
    return unit.from_rows(rows, shape).to(weight.dtype), bias.to(weight.dtype)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _input(node: fx.Node) -> fx.Node | None:
    """The operation or module whose result a module call takes; None for an input of the network."""
    found = node.args[0] if node.args else node.kwargs.get("input")
    return found if isinstance(found, fx.Node) and found.op.startswith("call_") else None


def _is_identity(module: nn.Module | None) -> bool:
    """As a batch norm folded before is now."""
    if module is None or type(module) not in (nn.Identity, FoldedBatchNorm):
        return False
    return not module._forward_hooks and not module._forward_pre_hooks
