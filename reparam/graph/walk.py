"""Who consumes a layer's units: from its output forward, through operations that commute with a factor a unit.

    f(s ∘ x) = s ∘ f(x)     for any s ("signs"): dropout, average pooling, means over space, flattening
                            for s > 0 ("positive scales"): these, ReLU, LeakyReLU, PReLU, max pooling
    W f(s ∘ x) = (W diag(s)) f(x)

Shapes are not known; the position of the channel axis is, counted from the end. Positive axes (``flatten(1)``,
``mean((2, 3))``) and ``view(-1, features)`` are read as in a batch: axis 0 counts samples.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from reparam.graph.capture import Capture
from reparam.graph.columns import input_channels, linear_kind
from reparam.graph.inplace import fixed

Through = Literal["signs", "positive scales"]

#: operation -> over how many of the last axes it pools
LINEAR: dict[object, int] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), 0),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, "contiguous"), 0),
    **dict.fromkeys((nn.AvgPool1d, nn.AdaptiveAvgPool1d, F.avg_pool1d, F.adaptive_avg_pool1d), 1),
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d), 2),
    **dict.fromkeys((nn.AvgPool3d, nn.AdaptiveAvgPool3d, F.avg_pool3d, F.adaptive_avg_pool3d), 3),
}
HOMOGENEOUS: dict[object, int] = {
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU), 0),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), 0),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, "prelu"), 0),
    **dict.fromkeys((nn.MaxPool1d, nn.AdaptiveMaxPool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AdaptiveMaxPool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AdaptiveMaxPool3d), 3),
    **dict.fromkeys((F.max_pool1d, F.adaptive_max_pool1d, torch.max_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.adaptive_max_pool2d, torch.max_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.adaptive_max_pool3d, torch.max_pool3d), 3),
}
_FLATTEN = (nn.Flatten, torch.flatten, "flatten")
_VIEW = ("view", "reshape", torch.reshape)
_MEAN = (torch.mean, "mean")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Consumer:
    """A linear layer that a layer's units feed.

    Attributes:
        node: its call.
        module: the layer, plain or reparameterized; its values may be changed (:func:`~reparam.graph.inplace.fixed`).
        repeat: how many consecutive input channels each unit feeds; more than one behind a flattening.
    """

    node: fx.Node
    module: nn.Module
    repeat: int


def linear_consumers(
    captured: Capture, node: fx.Node, units: int, axis: int, through: Through
) -> list[Consumer] | str:
    """All linear layers that take the result of ``node``, in the order they run, or why there are others.

    Args:
        captured: with a graph.
        node: its result has the units on one axis.
        units: how many.
        axis: which axis, from the end (``Kind.channel``).
        through: by what the units would be multiplied: which operations may stand between.

    Returns:
        At least one consumer; or the reason, in one line, why a factor cannot be moved into the consumers.
    """
    found: list[Consumer] = []
    todo = [(node, _Place(axis, False))]
    while todo:
        current, place = todo.pop()
        for user in captured.consumers(current):
            if takes_no_values(user):
                continue
            module = captured.module(user)
            if not only_input(user, current):
                return _refused(captured, user, through)
            if module is not None and linear_kind(module) is not None:
                reason = _unfit(captured, user, module, units, place)
                if reason is not None:
                    return reason
                found.append(Consumer(user, module, input_channels(module) // units))
                continue
            if module is not None and (module._forward_hooks or module._forward_pre_hooks):
                return f"hooks of `{user.target}` take values that would change"
            after = _passed(user, module, place, through)
            if after is None:
                return _refused(captured, user, through)
            todo.append((user, after))
    order = captured.nodes().index
    return sorted(found, key=lambda consumer: order(consumer.node)) or "nothing consumes its output"


def takes_no_values(node: fx.Node) -> bool:
    """Whether a node looks only at a tensor's shape or type: ``x.size(0)``, ``x.shape``."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")


def describe(captured: Capture, node: fx.Node) -> str:
    """A node for a message: "`act` (GELU)", "`gelu_1`"."""
    module = captured.module(node)
    return f"`{node.name}`" if module is None else f"`{node.target}` ({type(module).__name__})"


@dataclass(frozen=True)
class _Place:
    """Where the units are: their axis from the end, and whether positions in space were flattened into it."""

    axis: int
    flat: bool


def _passed(node: fx.Node, module: nn.Module | None, before: _Place, through: Through) -> _Place | None:
    """Where the units are behind an operation; None if a factor cannot be moved past it."""
    key = node.target if module is None else type(module)
    pooled = LINEAR.get(key)
    if pooled is None and through == "positive scales":
        pooled = HOMOGENEOUS.get(key)
    if pooled is not None:
        return before if -before.axis > pooled else None
    if key in _FLATTEN:
        start, end = (
            (module.start_dim, module.end_dim)
            if isinstance(module, nn.Flatten)
            else (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
        )
        return _flattened(before) if start in (1, before.axis) and end == -1 else None
    if key in _VIEW:
        return _flattened(before) if _keeps_samples(node) else None
    if key in _MEAN:
        return _averaged(node, before)
    return None


def _flattened(before: _Place) -> _Place:
    return _Place(-1, before.flat or before.axis < -1)


def _keeps_samples(node: fx.Node) -> bool:
    """Whether a view is ``view(samples, -1)``, ``view(samples, features)`` or ``view(-1, features)``."""
    shape = node.args[1:] if len(node.args) != 2 else node.args[1]
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        return False
    samples, features = shape
    if not isinstance(features, int):
        return False
    return _counts_samples(samples) if isinstance(samples, fx.Node) else bool(samples == -1)


def _counts_samples(node: fx.Node) -> bool:
    """``x.size(0)``, ``x.size()[0]`` or ``x.shape[0]``."""
    if node.target is operator.getitem:
        of = node.args[0]
        return isinstance(of, fx.Node) and takes_no_values(of) and bool(node.args[1] == 0)
    return node.target == "size" and bool(_argument(node, 1, "dim") == 0)


def _averaged(node: fx.Node, before: _Place) -> _Place | None:
    """``mean`` over some or all axes of space."""
    axes = _argument(node, 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, (list, tuple)) or not all(isinstance(a, int) for a in axes):
        return None
    # In a batch the channel axis is axis 1.
    from_end = {a if a < 0 else a - 1 + before.axis for a in axes}
    if not all(before.axis < a < 0 for a in from_end):
        return None
    keeps = _argument(node, 2, "keepdim", False)
    return before if keeps else _Place(before.axis + len(from_end), before.flat)


def _unfit(captured: Capture, node: fx.Node, module: nn.Module, units: int, place: _Place) -> str | None:
    kind, channels = linear_kind(module), input_channels(module)
    assert kind is not None
    if module._forward_pre_hooks:
        return f"hooks of `{node.target}` take values that would change"
    fits = channels % units == 0 if place.flat else channels == units
    if kind.channel != place.axis or not fits:
        return f"{describe(captured, node)} does not take its units as input channels"
    return fixed(captured, module)


def _refused(captured: Capture, node: fx.Node, through: Through) -> str:
    module, what = captured.module(node), describe(captured, node)
    if node.op == "output":
        return "its output leaves the network"
    if node.target in _ADD:
        return f"{what} adds another result to it (a residual connection)"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"{what} takes its output: fold batch norm first"
    return f"{what} takes its output, and {through} cannot be moved past that"


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def only_input(node: fx.Node, data: fx.Node) -> bool:
    """Whether ``data`` is what the operation works on, and nothing else of it."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return _argument(node, 0, "input") is data and found.count(data) == 1
