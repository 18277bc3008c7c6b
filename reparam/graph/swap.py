"""Replace the layers a file's records name by layers that hold those parameterizations.

conv1: Conv2d(weight)   --record conv1.weight: gmp-->   conv1: GmPConv2d(r, theta)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from reparam.checkpoint.metadata import LayerRecord
from reparam.errors import ArchitectureError
from reparam.layers import LAYERS


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
    chosen: dict[int, tuple[str, LayerRecord]] = {}
    for key, record in records.items():
        if record.kind == "sp":
            continue
        name, _, parameter = key.rpartition(".")
        if name not in modules:
            raise ArchitectureError(
                f"`{key}`: the file holds this layer, {type(model).__name__} does not: is the architecture "
                "the one it was trained with?"
            )
        if parameter != "weight" or (record.kind, type(modules[name])) not in LAYERS:
            held = f"the `{parameter}` of {type(modules[name]).__name__}"
            raise ArchitectureError(
                f"`{key}`: no {record.kind} layer for {held} yet: "
                "`reparam convert` the file back with --to sp, or leave this layer out with --exclude"
            )
        chosen[id(modules[name])] = key, record

    def replacement(module: nn.Module) -> nn.Module | None:
        if id(module) not in chosen:
            return None
        key, record = chosen[id(module)]
        try:
            return LAYERS[record.kind, type(module)].from_record(module, record)
        except ArchitectureError as error:
            raise ArchitectureError(f"`{key}`: {error}") from error

    return replace_modules(model, replacement)


def replace_modules(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A deep copy of ``model`` with some of its modules exchanged.

    Args:
        model: not changed.
        replacement: asked once for every module of ``model``; None keeps the module.

    Returns:
        The copy. A replaced module is replaced wherever it is used; shared modules and tensors stay shared.
    """
    # deepcopy takes what its memo holds for an object's copy: sharing is kept without bookkeeping of our own.
    memo: dict[int, object] = {}
    for module in model.modules():
        new = replacement(module)
        if new is not None:
            memo[id(module)] = new
    return copy.deepcopy(model, memo)
