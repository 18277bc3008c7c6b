"""Which floating initializers of an exported graph depend on no weight.

The exporter computes what it can: `1 + gamma` becomes an initializer of its own, though `gamma` may be held too. Such a
value cannot be told from a constant by looking at it, but it changes with the weights, and a constant does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reparam.errors import CheckFailedError
from reparam.export.initializers import Held
from reparam.onnxfile.external import raw
from reparam.onnxfile.weight_map import WeightMap

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


def find_constants(
    program: ONNXProgram,
    weights: WeightMap,
    model: nn.Module,
    export: Callable[[nn.Module], ONNXProgram],
) -> list[str]:
    """Names of the floating initializers that hold no weight and are the same for other weights.

    Args:
        program: the export.
        weights: which of its initializers hold weights.
        model: what was exported. Not changed.
        export: exports a model as ``program`` was; called only if what is left over may depend on weights.
    """
    left = {name: held for name, held in _floating(program).items() if name not in weights.sources}
    single = all(torch.Size(held.shape).numel() == 1 for held in left.values())
    if not left or (single and not _has_single_values(program)):
        return sorted(left)
    try:
        others = _floating(export(distinct(model)))
    except CheckFailedError:  # a network that other weights do not suit: nothing is known to be constant
        return []
    return sorted(name for name, held in left.items() if name in others and _equal(held, others[name]))


def distinct(model: nn.Module) -> nn.Module:
    """A copy whose floating tensors are all different; variances stay positive."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for value in changed.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator).to(value.dtype))
    return changed


def _floating(program: ONNXProgram) -> dict[str, Held]:
    held = {name: Held(value) for name, value in program.model.graph.initializers.items()}
    return {
        name: x
        for name, x in held.items()
        if x.is_known and x.dtype is not None and x.dtype.is_floating_point
    }


def _equal(a: Held, b: Held) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and raw(a.tensor()) == raw(b.tensor())


def _has_single_values(program: ONNXProgram) -> bool:
    """Whether the captured program has a weight of one element, or computes one from weights alone."""
    exported = program.exported_program
    assert exported is not None
    signature = exported.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    alone: set[torch.fx.Node] = set()
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            return True  # a branch or a loop: what it computes is not followed
        inputs = node.all_input_nodes
        if node.name in weights or (node.op == "call_function" and inputs and alone.issuperset(inputs)):
            alone.add(node)
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1:
                return True
        elif node.name in signature.inputs_to_lifted_tensor_constants:
            alone.add(node)
    return False
