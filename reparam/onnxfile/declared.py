"""What an ONNX file declares of its inputs."""

from __future__ import annotations

import onnx

from reparam.graph.inputs import DTYPES, InputSpec
from reparam.onnxfile.reading import TYPES


def declared_inputs(model: onnx.ModelProto) -> dict[str, InputSpec | None]:
    """By name, in the order of the file; None where type or shape are not told, or of a type no input may have.

    Axes of one symbol are one dynamic axis; those without a symbol are dynamic too, each of its own.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    return {value.name: _spec(value) for value in model.graph.input if value.name not in held}


def _spec(value: onnx.ValueInfoProto) -> InputSpec | None:
    kind = value.type.tensor_type
    dtype = str(TYPES.get(kind.elem_type)).removeprefix("torch.")
    if dtype not in DTYPES or not kind.HasField("shape"):
        return None
    axes = tuple(
        dim.dim_value if dim.dim_value > 0 else dim.dim_param or f"{value.name}.{i}"
        for i, dim in enumerate(kind.shape.dim)
    )
    return InputSpec(value.name, axes, dtype)
