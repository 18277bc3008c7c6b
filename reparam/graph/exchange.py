"""Exchange modules of a network on a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn


def replace_modules(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A deep copy of ``model`` with some of its modules exchanged.

    Args:
        model: not changed.
        replacement: asked once for every module of ``model``; None keeps the module.

    Returns:
        The copy. A replaced module is replaced wherever it is used, and the children it has in common with the module
        it replaces are copied and replaced like all others; shared modules and tensors stay shared.
    """
    # deepcopy takes what its memo holds for an object's copy: sharing is kept without bookkeeping of our own. It refuses
    # tensors with a history, which hooks of torch.nn.utils (weight norm) leave and compute anew before every call.
    memo: dict[int, object] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    exchanged: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        new = replacement(module)
        if new is not None:
            memo[id(module)] = new
            exchanged.append((module, new))
    for module, new in exchanged:
        for name, child in module._modules.items():
            if child is not None and name in new._modules:
                new._modules[name] = copy.deepcopy(child, memo)
    return copy.deepcopy(model, memo)
