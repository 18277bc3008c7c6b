"""What of an ONNX file its outputs depend on, and the tensors that stand inside of its nodes.

An initializer that no node reads proves nothing: the node may have been given a constant instead.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from reparam.onnxfile.reading import Initializer, graphs


def read_names(model: onnx.ModelProto) -> set[str]:
    """Names of the main graph's values that its outputs are computed from, the outputs among them."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    read: set[str] = set()
    todo = [value.name for value in model.graph.output]
    while todo:
        name = todo.pop()
        if name and name not in read:
            read.add(name)
            todo += _inputs(made_by[name]) if name in made_by else []
    return read


def _inputs(node: onnx.NodeProto) -> list[str]:
    """What a node reads, also in the graphs inside of it."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names += [value.name for value in graph.output]
            names += [name for inner in graph.node for name in _inputs(inner)]
    return names


def constant_tensors(path: Path, model: onnx.ModelProto) -> dict[str, Initializer]:
    """The tensors of all Constant nodes, by the name of the node's result."""
    found = {}
    for graph in graphs(model):
        for node in graph.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.name == "value":
                    found[node.output[0]] = Initializer(attribute.t, path)
                elif attribute.name == "value_floats":
                    floats = list(attribute.floats)
                    tensor = helper.make_tensor(node.output[0], TensorProto.FLOAT, [len(floats)], floats)
                    found[node.output[0]] = Initializer(tensor, path)
    return found
