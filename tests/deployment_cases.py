"""Small ONNX files of one weight, written node by node, and the networks they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from reparam.graph import InputSpec
from reparam.verification import Report

ROWS = [InputSpec("x", ("N", 4))]
WEIGHT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Whatever ``function`` makes of the input and a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def graph(
    nodes: Sequence[onnx.NodeProto],
    path: Path,
    outputs: Sequence[tuple[str, int]] = (("y", TensorProto.FLOAT),),
    inputs: Sequence[tuple[str, int, list[int | str]]] = (("x", TensorProto.FLOAT, ["N", 4]),),
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    """An ONNX file of these nodes; `weight` is WEIGHT transposed."""
    values = {"weight": WEIGHT.numpy().T, **(constants or {})}
    kind = inputs[0][1] if inputs[0][1] in (TensorProto.FLOAT, TensorProto.FLOAT16) else TensorProto.FLOAT
    values["weight"] = values["weight"].astype(helper.tensor_dtype_to_np_dtype(kind))
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


MATMUL = helper.make_node("MatMul", ["x", "weight"], ["z"])


def to(op: str, *more: str, **attributes: object) -> list[onnx.NodeProto]:
    return [MATMUL, helper.make_node(op, ["z", *more], ["y"], **attributes)]


def names(report: Report) -> list[str]:
    return [check.name for check in report.checks]
