"""What rules see of a network: its modules, and where torch.fx can trace it, what is computed from what.

A capture only looks: rules change modules in place on a copy of the user's model, and capture again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from reparam.errors import ReparamError
from reparam.layers import Reparameterized, layer_class


@dataclass(frozen=True)
class Capture:
    """A model and its graph.

    Attributes:
        model: the captured model itself.
        graph: one node an operation; None where the model does not trace.
        untraceable: why not, in one line.
    """

    model: nn.Module
    graph: fx.Graph | None
    untraceable: str | None = None

    def nodes(self) -> list[fx.Node]:
        """All nodes in the order they run; none without a graph."""
        return [] if self.graph is None else list(self.graph.nodes)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls, None for any other node."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """Every call of this very module, whatever names it goes by."""
        return [node for node in self.nodes() if self.module(node) is module]

    def names(self, module: nn.Module) -> list[str]:
        """All names this very module goes by, in the order of ``named_modules``."""
        return [name for name, m in self.model.named_modules(remove_duplicate=False) if m is module]

    def reads(self, module: nn.Module) -> list[fx.Node]:
        """Every use of one of the module's own parameters or buffers outside its call."""
        names = set(self.names(module))
        return [n for n in self.nodes() if n.op == "get_attr" and str(n.target).rpartition(".")[0] in names]

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that take this node's result, in the order they run."""
        return sorted(node.users, key=self.nodes().index)


def capture(model: nn.Module) -> Capture:
    """Trace ``model`` with torch.fx; layers of the library and of torch are one node each. It is not changed.

    A model whose graph depends on whether it is training (``F.dropout(x, training=self.training)``) counts as one
    that does not trace: its graph would bake in the mode.
    """
    try:
        graphs = [_trace(model, training) for training in (False, True)]
    except Exception as error:  # whatever a user's forward raises when it is handed proxies
        lines = str(error).splitlines()
        return Capture(
            model,
            None,
            f"torch.fx cannot trace {type(model).__name__}: {lines[0] if lines else type(error).__name__}",
        )
    if _code(graphs[0]) != _code(graphs[1]):
        return Capture(
            model,
            None,
            f"what {type(model).__name__} computes depends on its training mode outside of its layers",
        )
    return Capture(model, graphs[0])


class _Tracer(fx.Tracer):
    # Buffers a forward pass reads are nodes like parameters, not constants with their values.
    proxy_buffer_attributes = True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # Nodes know nothing of the contexts they were made in.
        if not torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            raise ReparamError(
                "its forward pass switches gradients off or autocast on, which a graph does not hold"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        # torch.fx would write it into the model, as a constant: a weight composed while tracing, a random draw.
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            known = a in self.tensor_attrs or any(a is buffer for buffer in self.root.buffers())
            if not known:
                raise ReparamError("its forward pass uses a tensor that is no input, parameter or buffer")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, Reparameterized)
            or layer_class("gmp", type(m)) is not None
            or super().is_leaf_module(m, module_qualified_name)
        )


def _trace(model: nn.Module, training: bool) -> fx.Graph:
    """The graph in one mode; every module's own mode is restored."""
    if "forward" in model.__dict__:
        raise ReparamError("its forward pass was replaced by an attribute")
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _Tracer().trace(model)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _code(graph: fx.Graph) -> str:
    return str(graph.python_code("self").src)
