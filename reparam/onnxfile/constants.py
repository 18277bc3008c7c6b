"""What an ONNX file holds beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from reparam.errors import CheckpointError
from reparam.onnxfile.metadata import CONSTANTS, properties
from reparam.onnxfile.reading import Initializer, graphs


def recorded_constants(base: Path, model: onnx.ModelProto) -> set[str]:
    """The constants that the export found to depend on no weight."""
    try:
        return set(json.loads(properties(model).get(CONSTANTS, "[]")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{base}: its list of constants is malformed") from error


def floating_constants(model: onnx.ModelProto, initializers: Mapping[str, Initializer]) -> dict[str, int]:
    """Elements of all that is floating: initializers, and what nodes hold that nothing else is kept in."""
    inside = {
        node.output[0]: Initializer(attribute.t, Path())
        for graph in graphs(model)
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.HasField("t")
    }
    return {
        name: math.prod(held.shape)
        for name, held in {**inside, **initializers}.items()
        if held.dtype is not None and held.dtype.is_floating_point
    }
