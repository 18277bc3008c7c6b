"""Replace the layers a file's records name by layers that hold those parameterizations.

conv1: Conv2d(weight)   --record conv1.weight: gmp-->   conv1: GmPConv2d(r, theta)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from reparam.checkpoint.metadata import LayerRecord
from reparam.errors import ArchitectureError
from reparam.layers import layer_class
from reparam.layers.kinds import weight_names


def apply_records(model: nn.Module, records: Mapping[str, LayerRecord]) -> nn.Module:
    """A copy of ``model`` whose recorded layers are ready for the file's tensors.

    Args:
        model: the plain architecture; not changed.
        records: by the key of the plain weight ("conv1.weight"), as a checkpoint gives them.

    Returns:
        The copy. Replaced layers hold zeros until tensors are loaded; a layer used under two names stays one.

    Raises:
        ArchitectureError: a record for a layer the architecture lacks, of another shape, or of a kind no
            layer class holds.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[int, dict[str, tuple[str, LayerRecord]]] = {}
    for key, record in records.items():
        if record.kind == "sp":
            continue
        name, _, parameter = key.rpartition(".")
        if name not in modules:
            raise ArchitectureError(
                f"`{key}`: the file holds this layer, {type(model).__name__} does not: is the architecture "
                "the one it was trained with?"
            )
        module = modules[name]
        if layer_class(record.kind, type(module)) is None or parameter not in weight_names(module):
            held = f"the `{parameter}` of {type(module).__name__}"
            raise ArchitectureError(
                f"`{key}`: no {record.kind} layer for {held} yet: "
                "`reparam convert` the file back with --to sp, or leave this layer out with --exclude"
            )
        others = chosen.setdefault(id(module), {})
        if any(other.kind != record.kind for _, other in others.values()):
            raise ArchitectureError(
                f"`{key}`: {record.kind} beside another parameterization in one {type(module).__name__}: "
                "`reparam convert` the file to one of them"
            )
        others[parameter] = key, record

    def replacement(module: nn.Module) -> nn.Module | None:
        if id(module) not in chosen:
            return None
        found = chosen[id(module)]
        key, record = next(iter(found.values()))
        cls = layer_class(record.kind, type(module))
        assert cls is not None
        try:
            return cls.from_records(module, {parameter: record for parameter, (_, record) in found.items()})
        except ArchitectureError as error:
            raise ArchitectureError(f"`{key}`: {error}") from error

    return replace_modules(model, replacement)


def replace_modules(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A deep copy of ``model`` with some of its modules exchanged.

    Args:
        model: not changed.
        replacement: asked once for every module of ``model``; None keeps the module.

    Returns:
        The copy. A replaced module is replaced wherever it is used, and the children it has in common with the module
        it replaces are copied and replaced like all others; shared modules and tensors stay shared.
    """
    # deepcopy takes what its memo holds for an object's copy: sharing is kept without bookkeeping of our own.
    memo: dict[int, object] = {}
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
