"""Who consumes a layer's units: from its output forward, through operations that commute with a factor a unit.

    f(s ∘ x) = s ∘ f(x)     for any s ("signs"): dropout, average pooling, means over space, flattening
                            for s > 0 ("positive scales"): these, ReLU, LeakyReLU, PReLU, max pooling
    W f(s ∘ x) = (W diag(s)) f(x)

Shapes are not known; the position of the channel axis is, counted from the end. Positive axes (``flatten(1)``,
``mean((2, 3))``) are read as in a batch: axis 0 counts samples. A view flattens if it keeps that axis for sure:
``x.view(x.size(0), -1)``, and not ``x.view(-1, 120)``, whose rows may be parts of samples, or several.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from reparam.graph.capture import Capture
from reparam.graph.columns import input_channels, linear_kind
from reparam.graph.inplace import fixed
from reparam.graph.rewritten import has_hooks
from reparam.layers.geometric import scale_units

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
    origin = _origin(node)
    reason = _watched(captured, _modules_around(origin) - {origin.target})
    if reason is not None:
        return reason
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
            reason = _watched(captured, _modules_around(user))
            if reason is not None:
                return reason
            if module is not None and linear_kind(module) is not None:
                reason = _unfit(captured, user, module, units, place)
                if reason is not None:
                    return reason
                found.append(Consumer(user, module, input_channels(module) // units))
                continue
            after = _passed(captured, user, place, through)
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


def _passed(captured: Capture, node: fx.Node, before: _Place, through: Through) -> _Place | None:
    """Where the units are behind an operation; None if a factor cannot be moved past it."""
    module, key = captured.module(node), operation(captured, node)
    pooled = LINEAR.get(key)
    if pooled is None and through == "positive scales":
        pooled = HOMOGENEOUS.get(key)
    if pooled is not None:
        return before if -before.axis > pooled else None
    if key in _FLATTEN:
        start, end = _flattened_axes(node, module)
        return _flattened(before) if start in (1, before.axis) and end == -1 else None
    if key in _VIEW:
        return _flattened(before) if _keeps_samples(captured, node) else None
    if key in _MEAN:
        return _averaged(node, before)
    return None


def operation(captured: Capture, node: fx.Node) -> object:
    """What a node does, as the tables above name it."""
    module = captured.module(node)
    return node.target if module is None else type(module)


def _flattened_axes(node: fx.Node, module: nn.Module | None) -> tuple[Any, Any]:
    """The first and the last axis that a flattening takes."""
    if isinstance(module, nn.Flatten):
        return module.start_dim, module.end_dim
    return _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)


def _flattened(before: _Place) -> _Place:
    return _Place(-1, before.flat or before.axis < -1)


def _keeps_samples(captured: Capture, node: fx.Node) -> bool:
    """Whether a view is ``x.view(samples, -1)`` or ``x.view(samples, features)`` with as many samples as ``x`` has."""
    shape = node.args[1:] if len(node.args) != 2 else node.args[1]
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        return False
    samples, features = shape
    data, counted = _argument(node, 0, "input"), _counted(samples)
    if counted is None or not isinstance(features, int) or not isinstance(data, fx.Node):
        return False
    return _batch(captured, data) is _batch(captured, counted)


def _counted(size: Any) -> fx.Node | None:
    """The tensor whose axis 0 this counts: x of ``x.size(0)``, ``x.size()[0]`` or ``x.shape[0]``."""
    if not isinstance(size, fx.Node):
        return None
    if size.target is operator.getitem and size.args[1] == 0:
        size = size.args[0]
        whole = isinstance(size, fx.Node) and (
            (size.target == "size" and len(size.args) == 1 and not size.kwargs)
            or (size.target is getattr and size.args[1] == "shape")
        )
    else:
        whole = size.target == "size" and _argument(size, 1, "dim") == 0
    data = size.args[0] if whole and isinstance(size, fx.Node) else None
    return data if isinstance(data, fx.Node) else None


def _batch(captured: Capture, node: fx.Node) -> fx.Node:
    """The first tensor that has its samples on axis 0 just as this one has them."""
    while True:
        key, module = operation(captured, node), captured.module(node)
        keeps = (
            key in LINEAR
            or key in HOMOGENEOUS
            or key is scale_units
            or isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (module is not None and linear_kind(module) is not None)
            or (key in _FLATTEN and _flattened_axes(node, module)[0] == 1)
            or (key in _VIEW and _keeps_samples(captured, node))
        )
        data = _argument(node, 0, "input") if keeps else None
        if not isinstance(data, fx.Node):
            return node
        node = data


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
    if operation(captured, node) in _VIEW:
        return f"{what} takes its output, and need not keep its samples apart: write flatten(1)"
    return f"{what} takes its output, and {through} cannot be moved past that"


def _origin(node: fx.Node) -> fx.Node:
    """The call of a module that a result comes from: a scale may stand behind functions."""
    while node.op != "call_module" and isinstance(data := _argument(node, 0, "input"), fx.Node):
        node = data
    return node


def _modules_around(node: fx.Node) -> set[object]:
    """The names of the module that a node calls and of those whose forward passes it stands in, but for the model."""
    called = str(node.target).split(".") if node.op == "call_module" else []
    stack = node.meta.get("nn_module_stack") or {}
    return {".".join(called[:end]) for end in range(1, len(called) + 1)} | {
        name for name, _ in stack.values() if name
    }


def _watched(captured: Capture, names: Iterable[object]) -> str | None:
    """Whose hooks see values that would change, in one line; None if nobody's do."""
    hooked = sorted(str(name) for name in names if has_hooks(captured.model.get_submodule(str(name))))
    return f"hooks of `{hooked[0]}` take values that would change" if hooked else None


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def only_input(node: fx.Node, data: fx.Node) -> bool:
    """Whether ``data`` is what the operation works on, and nothing else of it."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return _argument(node, 0, "input") is data and found.count(data) == 1
