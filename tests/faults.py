"""The catalogue of faults: what can go wrong between a model and its ONNX file, done to two small files.

A vision network (batch norm, convolutions, pooling, two heads) and a text network (embedding, LSTM, layer norm, argmax),
exported once for each type. Faults change the file in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.export import export_onnx_model
from reparam.graph import InputSpec, convert, fold
from reparam.onnxfile.mapping import find_map
from reparam.onnxfile.reading import read_initializers
from reparam.onnxfile.weight_map import WeightMap
from reparam.verification import Report, verify_onnx

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Vision(nn.Module):
    """Two outputs of one shape; one unit of `dilated` is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)
        self.side = nn.Linear(8, 4)
        fill(self)
        with torch.no_grad():
            self.dilated.bias[3] = -1000.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.conv(self.norm(x)), 0.1)
        x = F.max_pool2d(F.relu(self.dilated(x)), 2)
        x = torch.sigmoid(self.depthwise(x)).mean((2, 3))
        return F.softmax(self.head(x), dim=1), self.side(x)


class Text(nn.Module):
    """Token ids in, scores and the best class out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        fill(self)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h, _ = self.lstm(self.tokens(ids))
        scores = self.head(self.norm(h))
        return scores, scores.argmax(-1)


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's size, running statistics and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.05)
            else:
                fan_in = max(1, value[0].numel()) if value.dim() > 1 else 4
                value.copy_(torch.randn(value.shape, generator=generator) / fan_in**0.5)
                if name.endswith("norm.weight"):
                    value.add_(1)


@dataclass(frozen=True)
class Exported:
    """A network and its file.

    Attributes:
        reference: the original, reparameterized, float32.
        folded: the plain network the file was made from.
        path: the file.
        specs: its inputs.
        weights: its map.
        names: of its outputs.
    """

    reference: nn.Module
    folded: nn.Module
    path: Path
    specs: list[InputSpec]
    weights: WeightMap
    names: list[str]

    def verify(self, path: Path | None = None, seed: int = 0) -> Report:
        """The three proofs, of another file in this one's place."""
        return verify_onnx(
            self.reference,
            self.folded,
            path or self.path,
            self.specs,
            self.weights,
            seed=seed,
            outputs=self.names,
        )


def exported(
    model: nn.Module, specs: list[InputSpec], path: Path, kind: str = "fp32", to: str = "gmp"
) -> Exported:
    """Convert, fold, export."""
    reference = convert(model.eval(), to).eval() if to != "sp" else model.eval()
    folded = fold(reference).eval().to(TYPES[kind])
    given = [replace(s, dtype=str(TYPES[kind]).removeprefix("torch.")) if s.is_float else s for s in specs]
    export_onnx_model(folded, given, path)
    found = find_map(
        read_initializers(path),
        folded.state_dict(),
        {n: m.eps for n, m in folded.named_modules() if hasattr(m, "eps")},
    )
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.output]
    return Exported(reference, folded, path, specs, found.weights, names)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[InputSpec]]] = {
    "vision": (Vision, [InputSpec("x", ("N", 3, 10, 10))]),
    "text": (Text, [InputSpec("ids", ("N", "T"), "int64")]),
}

Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Fault:
    """One thing done to a file.

    Attributes:
        network: to which.
        change: in place.
        proofs: those that must catch it at fp32; others may as well.
        key: of the weight it is done to, "" for none.
        layer: at which the file first departs, "" where that is behind all layers, or before them.
        kinds: types in which it is a fault.
    """

    network: str
    change: Change
    proofs: tuple[str, ...] = ("deployment",)
    key: str = ""
    layer: str = ""
    kinds: tuple[str, ...] = ("fp32", "fp16", "bf16")

    def is_named(self, key: str | None) -> bool:
        """Whether ``key`` is the layer at fault; any where no layer is."""
        if self.key:
            return key == self.key
        return not self.layer or (key or "").startswith(f"{self.layer}.")


def both(*changes: Change) -> Change:
    """One after the other."""

    def apply(model: onnx.ModelProto) -> None:
        for change in changes:
            change(model)

    return apply


def node(model: onnx.ModelProto, op: str, index: int = 0) -> Any:
    """The file's ``index``-th node of an operator."""
    return [n for n in model.graph.node if n.op_type == op][index]


def weight(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    """Change an initializer's values in place, or return others."""

    def apply(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        value = numpy_helper.to_array(tensor).copy()
        new = change(value)
        value = value if new is None else np.ascontiguousarray(new).astype(value.dtype)
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return apply


def attribute(op: str, name: str, value: Any, index: int = 0) -> Change:
    """Set an attribute of a node."""

    def apply(model: onnx.ModelProto) -> None:
        found = node(model, op, index)
        kept = [a for a in found.attribute if a.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return apply


_KEPT = {"AveragePool": ("kernel_shape", "strides", "pads"), "ArgMin": ("axis", "keepdims")}


def operator(old: str, new: str, index: int = 0) -> Change:
    """Make a node compute something else."""

    def apply(model: onnx.ModelProto) -> None:
        found = node(model, old, index)
        found.op_type = new
        kept = [a for a in found.attribute if a.name in _KEPT.get(new, ())]
        del found.attribute[:]
        found.attribute.extend(kept)

    return apply


def after(op: str, nodes: Callable[[str, str], list[onnx.NodeProto]], index: int = 0) -> Change:
    """Put nodes behind a node's first output; they take and give the names."""

    def apply(model: onnx.ModelProto) -> None:
        found = node(model, op, index)
        result = found.output[0]
        found.output[0] = f"{result}_before"
        at = list(model.graph.node).index(found)
        for i, made in enumerate(nodes(found.output[0], result)):
            model.graph.node.insert(at + 1 + i, made)

    return apply


def at_output(index: int, nodes: Callable[[str, str], list[onnx.NodeProto]]) -> Change:
    """Put nodes before an output of the file."""

    def apply(model: onnx.ModelProto) -> None:
        name = model.graph.output[index].name
        last = next(n for n in model.graph.node if name in n.output)
        place = list(last.output).index(name)
        last.output[place] = f"{name}_before"
        for n in model.graph.node:
            for i, taken in enumerate(n.input):
                if taken == name:
                    n.input[i] = f"{name}_before"
        model.graph.node.extend(nodes(f"{name}_before", name))
        model.graph.output[index].type.tensor_type.ClearField("shape")

    return apply


def constant(name: str, like: onnx.ModelProto, value: Any) -> str:
    """Add an initializer of the file's own floating type."""
    kind = next(t.data_type for t in like.graph.initializer if t.data_type in (1, 10, 16))
    array = np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(kind))
    like.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def with_constant(op: str, value: float, index: int = 0) -> Change:
    """Combine an output with a number."""

    def apply(model: onnx.ModelProto) -> None:
        name = constant("number", model, value)
        at_output(index, lambda a, b: [helper.make_node(op, [a, name], [b])])(model)

    return apply


def swap_outputs(model: onnx.ModelProto) -> None:
    first, second = (value.name for value in model.graph.output)
    for n in model.graph.node:
        for i, name in enumerate(n.output):
            n.output[i] = {first: second, second: first}.get(name, name)


def bake_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def train_dropout(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    after("Sigmoid", lambda a, b: [helper.make_node("Dropout", [a, "ratio", "training"], [b])])(model)


def rename(place: str) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        value = getattr(model.graph, place)[0]
        old, value.name = value.name, "renamed"
        for n in model.graph.node:
            for names in (n.input, n.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = "renamed"

    return apply


def lose_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def through(kind: int) -> Callable[[str, str], list[onnx.NodeProto]]:
    def nodes(a: str, b: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Cast", [a], [f"{a}_cast"], to=kind),
            helper.make_node("CastLike", [f"{a}_cast", a], [b]),
        ]

    return nodes


def shift_ids(model: onnx.ModelProto) -> None:
    """Every token is read as the one before it; the first stays."""
    model.graph.initializer.append(numpy_helper.from_array(np.int64(1), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.int64(0), "none"))
    gather = node(model, "Gather")
    ids, gather.input[1] = gather.input[1], "shifted"
    made = [
        helper.make_node("Sub", [ids, "one"], ["less"]),
        helper.make_node("Max", ["less", "none"], ["shifted"]),
    ]
    for i, n in enumerate(made):
        model.graph.node.insert(i, n)


def lstm_weight(place: int, change: Callable[[np.ndarray], Any]) -> Change:
    """Change the weights an LSTM takes, whatever the exporter calls them."""
    return lambda model: weight(node(model, "LSTM").input[place], change)(model)


def flip_sign(value: np.ndarray) -> None:
    value.flat[np.abs(value.astype(np.float64)).argmax()] *= -1


def last_bit(at: Any) -> Callable[[np.ndarray], None]:
    def change(value: np.ndarray) -> None:
        bits = value.view({2: np.uint16, 4: np.uint32}[value.dtype.itemsize])
        bits[at] ^= 1

    return change


def nan_one(value: np.ndarray) -> None:
    value.flat[0] = np.nan


def swap_rows(value: np.ndarray) -> np.ndarray:
    return value[[1, 0, *range(2, len(value))]]


def swap_gates(value: np.ndarray) -> np.ndarray:
    """ONNX stacks i, o, f, c."""
    i, o, f, c = np.split(value, 4, axis=1)
    return np.concatenate([o, i, f, c], axis=1)


BOTH = ("weights", "deployment")
GRAPH = ("algebra", "deployment")

FAULTS: dict[str, Fault] = {
    "one sign flipped": Fault("vision", weight("conv.weight", flip_sign), BOTH, "conv.weight"),
    "last bit of one weight": Fault(
        "vision", weight("conv.weight", last_bit((1, 1, 1, 1))), ("weights",), "conv.weight"
    ),
    "last bit of a dead unit's weight": Fault(
        "vision", weight("dilated.weight", last_bit((3, 0, 0, 0))), ("weights",), "dilated.weight"
    ),
    "a dead unit's weights doubled": Fault(
        "vision",
        weight("dilated.weight", lambda w: w.__setitem__(3, w[3] * 2)),
        ("weights",),
        "dilated.weight",
    ),
    "bias dropped": Fault("vision", weight("side.bias", lambda b: b * 0), BOTH, "side.bias"),
    "kernel transposed": Fault(
        "vision", weight("dilated.weight", lambda w: w.swapaxes(2, 3)), BOTH, "dilated.weight"
    ),
    "kernel mirrored": Fault("vision", weight("conv.weight", lambda w: w[..., ::-1]), BOTH, "conv.weight"),
    "channels swapped": Fault("vision", weight("depthwise.weight", swap_rows), BOTH, "depthwise.weight"),
    "a NaN": Fault("vision", weight("head.weight", nan_one), BOTH, "head.weight"),
    "one layer 1% too large": Fault("vision", weight("side.weight", lambda w: w * 1.01), BOTH, "side.weight"),
    "weights rounded to 8 bits": Fault(
        "vision",
        weight("conv.weight", lambda w: np.round(w.astype(np.float32) * 64) / 64),
        BOTH,
        "conv.weight",
    ),
    "padding on one side": Fault("vision", attribute("Conv", "pads", [0, 0, 2, 2]), GRAPH, layer="conv"),
    "another stride": Fault("vision", attribute("Conv", "strides", [2, 2], 2), GRAPH, layer="depthwise"),
    "another dilation": Fault(
        "vision",
        both(attribute("Conv", "dilations", [1, 1], 1), attribute("Conv", "pads", [1] * 4, 1)),
        GRAPH,
        layer="dilated",
    ),
    "batch norm epsilon": Fault(
        "vision", attribute("BatchNormalization", "epsilon", 1e-1), GRAPH, layer="norm"
    ),
    "slope of the activation": Fault("vision", attribute("LeakyRelu", "alpha", 0.01), GRAPH, layer="dilated"),
    "activation missing": Fault("vision", operator("Relu", "Identity"), GRAPH, layer="depthwise"),
    "another activation": Fault("vision", operator("Sigmoid", "Tanh"), GRAPH, layer="head"),
    "average instead of maximum": Fault(
        "vision", operator("MaxPool", "AveragePool"), GRAPH, layer="depthwise"
    ),
    "softmax over the batch": Fault("vision", attribute("Softmax", "axis", 0), GRAPH),
    "a softmax too many": Fault(
        "vision", at_output(1, lambda a, b: [helper.make_node("Softmax", [a], [b])]), GRAPH
    ),
    "outputs swapped": Fault("vision", swap_outputs, GRAPH),
    "an output missing": Fault("vision", lose_output, GRAPH),
    "output broadcast": Fault(
        "vision", at_output(1, lambda a, b: [helper.make_node("ReduceMax", [a], [b], keepdims=1)]), GRAPH
    ),
    "output transposed": Fault(
        "vision", at_output(1, lambda a, b: [helper.make_node("Transpose", [a], [b])]), GRAPH
    ),
    "output offset": Fault("vision", with_constant("Add", 0.02, 1), GRAPH),
    "all NaN": Fault("vision", with_constant("Mul", float("nan"), 1), GRAPH),
    "float64 output": Fault(
        "vision",
        both(
            at_output(1, lambda a, b: [helper.make_node("Cast", [a], [b], to=TensorProto.DOUBLE)]),
            lambda m: setattr(m.graph.output[1].type.tensor_type, "elem_type", TensorProto.DOUBLE),
        ),
    ),
    "a value rounded to float16": Fault(
        "vision", after("Conv", through(TensorProto.FLOAT16)), kinds=("fp32",)
    ),
    "a value rounded to an integer": Fault("vision", after("Conv", through(TensorProto.INT32)), GRAPH),
    "batch fixed": Fault("vision", bake_batch),
    "dropout as in training": Fault("vision", train_dropout, kinds=("fp32",)),
    "input renamed": Fault("vision", rename("input")),
    "output renamed": Fault("vision", rename("output")),
    "unknown operator": Fault("vision", operator("Sigmoid", "Nope")),
    "LSTM gates in another order": Fault("text", lstm_weight(1, swap_gates), BOTH, "lstm.weight_ih_l0"),
    "LSTM reversed": Fault("text", attribute("LSTM", "direction", "reverse"), GRAPH, layer="lstm"),
    "a rare token's embedding": Fault(
        "text", weight("tokens.weight", last_bit((49, 2))), ("weights",), "tokens.weight"
    ),
    "smallest instead of largest": Fault("text", operator("ArgMax", "ArgMin")),
    "tokens off by one": Fault("text", shift_ids, GRAPH, layer="tokens"),
}


def faulty(base: Exported, fault: Fault, path: Path) -> Path:
    """The base's file with the fault."""
    model = onnx.load(base.path)
    fault.change(model)
    onnx.save(model, path)
    return path
