"""Which floating initializers of an exported graph depend on no weight.

The exporter computes what it can: `1 + gamma` becomes an initializer of its own, though `gamma` may be held too. Such a
value cannot be told from a constant by looking at it, but it changes with the weights, and a constant does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reparam.export.initializers import Held
from reparam.export.second import Second, floating
from reparam.onnxfile.external import raw
from reparam.onnxfile.weight_map import WeightMap

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


def find_constants(
    program: ONNXProgram, weights: WeightMap, second: Callable[[], Second | None]
) -> list[str]:
    """Names of the floating initializers that hold no weight and are the same for other weights.

    Args:
        program: the export.
        weights: which of its initializers hold weights.
        second: makes the export with other weights; called only if what is left over may depend on weights.
    """
    left = {name: held for name, held in floating(program).items() if name not in weights.sources}
    single = all(torch.Size(held.shape).numel() == 1 for held in left.values())
    if not left or (single and not _has_single_values(program)):
        return sorted(left)
    other = second()
    if other is None:  # a network that other weights do not suit: nothing is known to be constant
        return []
    return sorted(
        name for name, held in left.items() if name in other.held and _equal(held, other.held[name])
    )


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
