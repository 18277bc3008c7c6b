"""What is wrong with a file whatever its numbers are, seen from its graph alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import torch
from onnx import numpy_helper

from reparam.graph.inputs import InputSpec
from reparam.onnxfile.reading import TYPES, graphs
from reparam.verification.report import Check

_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)


def check_structure(
    model: onnx.ModelProto, specs: Sequence[InputSpec], outputs: Sequence[str] | None
) -> Check | None:
    """The first fault, or None.

    Args:
        model: the file.
        specs: the inputs it is to have.
        outputs: the names its outputs are to have, in order; None where only their values are known.
    """
    return next(_faults(model, specs, outputs), None)


def _faults(
    model: onnx.ModelProto, specs: Sequence[InputSpec], outputs: Sequence[str] | None
) -> Iterator[Check]:
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    names, wanted = [value.name for value in inputs], [spec.name for spec in specs]
    if names != wanted:
        yield Check("inputs", False, where=f"the file takes {names}, expected {wanted}")
        return
    for spec, value in zip(specs, inputs, strict=True):
        yield from _input(spec, value)
    given = [value.name for value in model.graph.output]
    if outputs is not None and given != list(outputs):
        yield Check("outputs", False, where=f"the file gives {given}, expected {list(outputs)}")
    training = _training(model)
    if training is not None:
        yield Check("evaluation mode", False, where=training)


def _input(spec: InputSpec, value: onnx.ValueInfoProto) -> Iterator[Check]:
    kind = value.type.tensor_type
    dtype = TYPES.get(kind.elem_type)
    # An export at another precision takes floats of that precision.
    if dtype != spec.torch_dtype and not (spec.is_float and dtype is not None and dtype.is_floating_point):
        yield Check("inputs", False, where=f"{spec.name} is {dtype} in the file, expected {spec.torch_dtype}")
    if not kind.HasField("shape"):
        return
    dims = kind.shape.dim
    if len(dims) != len(spec.axes):
        yield Check(
            "inputs", False, where=f"{spec.name} has {len(dims)} axes in the file, expected {spec.axes}"
        )
        return
    for dim, axis in zip(dims, spec.axes, strict=True):
        fixed = dim.dim_value if dim.HasField("dim_value") else None
        if isinstance(axis, str) and fixed is not None:
            yield Check(
                "dynamic axes", False, where=f"axis {axis} of {spec.name} is fixed at {fixed} in the file"
            )
        elif isinstance(axis, int) and fixed not in (None, axis):
            yield Check("inputs", False, where=f"{spec.name} has {fixed} where {axis} is expected")


def _training(model: onnx.ModelProto) -> str | None:
    """A node that computes what only training computes, or gives something else each time."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for graph in graphs(model):
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                constants[node.output[0]] = node.attribute[0].t
    for graph in graphs(model):
        for node in graph.node:
            told = f"{node.op_type} `{node.name or node.output[0]}`"
            if node.op_type in _RANDOM:
                return f"{told} draws random numbers: was the model in training mode?"
            trains = any(a.name == "training_mode" and a.i for a in node.attribute)
            if node.op_type == "BatchNormalization" and trains:
                return f"{told} normalizes by its batch, as in training"
            if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
                tensor = constants.get(node.input[2])
                if tensor is None or bool(numpy_helper.to_array(tensor).any()):
                    return f"{told} drops values, as in training"
    return None


def value_fault(
    y: torch.Tensor, f: torch.Tensor, got: torch.Tensor, kind: torch.dtype | None
) -> Check | None:
    """What no tolerance excuses about one output of one input; None if there is nothing.

    Args:
        y: of the original in float64.
        f: of the original at the deployed dtype.
        got: of the file.
        kind: what the file declares it to be.
    """
    name = ""
    if got.shape != y.shape:
        name, where = "shape", f"the file gives {list(got.shape)}, the original {list(y.shape)}"
    elif kind != f.dtype:
        name, where = "dtype", f"the file gives {kind}, the original {f.dtype}"
    elif not f.is_floating_point():
        return None
    elif y.dtype != torch.float64:
        name, where = (
            "reference",
            f"the original computes in {y.dtype} even when asked for float64: no reference",
        )
    else:
        for told, tensor in (("the original in float64", y), ("the file", got)):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad and not (told == "the file" and not bool(torch.isfinite(f).all())):
                name, where = "finite", f"{told} gives {bad} NaN or Inf of {y.numel()} values"
                break
    return Check(name, False, where=where) if name else None
