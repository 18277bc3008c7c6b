"""The exported file: torch's own graph, typed inputs, half precision, what it says of itself, values beside it."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch_exports
from export_cases import NETWORKS, Network, random_model, values_of
from support import bits, python
from torch import nn
from torch_exports import IMAGE, TorchExports, trained

import reparam
from examples.models.resnet import resnet18
from reparam.checkpoint.staging import staged
from reparam.errors import NonFiniteError, ReparamError
from reparam.export import export_onnx_model
from reparam.graph import convert, fold, parse_spec
from reparam.layers import Reparameterized
from reparam.onnxfile import transforms
from reparam.onnxfile.metadata import (
    PARAMETERIZATION,
    SOURCE,
    UNUSED,
    VERSION,
    annotate,
    properties,
    provenance,
)
from reparam.onnxfile.weight_map import KEY, WeightMap

EXAMPLES = {
    **torch_exports.EXAMPLES,
    "resnet18": Network(partial(resnet18, classes=10, stem="cifar", batch_norm=False), IMAGE),
}
FORMS: list[dict[str, Any]] = [
    {"to": "gmp"},
    {"to": "wn", "mean_norm": True},
    {"to": "gmp", "mean_norm": True},
]
SLOW = {"resnet18", "convpool_cnn_c", "draw", "dqn"}


def histogram(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> TorchExports:
    return TorchExports(EXAMPLES, tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join([form["to"], *list(form)[1:]]))
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EXAMPLES])
def test_no_trace_of_the_parameterization_remains(
    name: str, form: dict[str, Any], theirs: TorchExports, tmp_path: Path
) -> None:
    """Operators, in order, and initializers are those of torch's own export of the plain model with the folded values."""
    network = EXAMPLES[name]
    torch.manual_seed(0)
    converted = trained(convert(trained(network.build()), **form))
    assert any(isinstance(module, Reparameterized) for module in converted.modules())
    folded = fold(converted)
    ours = tmp_path / "ours.onnx"
    done = export_onnx_model(folded, network.specs, ours)
    assert done.found.ambiguous == {}
    state = folded.state_dict()
    gained = tuple(sorted(state.keys() - network.build().state_dict().keys()))  # biases that take up a mean
    assert not gained or "mean_norm" in form
    path, weights = theirs(name, gained)
    found, expected = onnx.load(ours), onnx.load(path)
    assert [node.op_type for node in found.graph.node] == [node.op_type for node in expected.graph.node]
    assert [x.name for x in found.graph.input] == [x.name for x in expected.graph.input]
    values, constants = values_of(ours), values_of(path)
    assert list(values) == list(constants)
    for key, value in values.items():
        source = weights.sources.get(key)
        wanted = constants[key] if source is None else transforms.apply(source, state)
        assert bits(value) == bits(wanted), key


def test_a_negative_scale_before_an_addition_leaves_one_multiplication(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).relu() + x)

    torch.manual_seed(0)
    model = convert(Block().eval(), "gmp")
    with torch.no_grad():
        r = next(x for key, x in model.named_parameters() if key.endswith("conv.r"))
        r[1] *= -1
    folded = fold(model)
    done = export_onnx_model(folded, [parse_spec("N,3,4,4")], tmp_path / "m.onnx")
    assert histogram(onnx.load(tmp_path / "m.onnx")) == {"Conv": 2, "Relu": 1, "Mul": 1, "Add": 1}
    signs = [source.keys for source in done.found.weights.sources.values() if "conv_sign" in source.keys[0]]
    assert signs == [("conv_sign",)]


def test_types_names_and_dynamic_axes_are_those_asked_for(tmp_path: Path) -> None:
    model = random_model("sequences", 1)
    export_onnx_model(model, NETWORKS["sequences"].specs, tmp_path / "m.onnx", opset=18)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.version for entry in proto.opset_import if not entry.domain} == {18}
    taken = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in proto.graph.input
    }
    assert taken == {
        "tokens": (onnx.TensorProto.INT64, ["N", 4]),
        "offset": (onnx.TensorProto.FLOAT, ["N", 1, 8]),
    }
    assert [value.type.tensor_type.elem_type for value in proto.graph.output] == [
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    ]
    generator = torch.Generator().manual_seed(0)
    tokens, offset = (
        torch.randint(0, 11, (3, 4), generator=generator),
        torch.randn(3, 1, 8, generator=generator),
    )
    with torch.no_grad():
        logits, best = model(tokens, offset)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"tokens": tokens.numpy(), "offset": offset.numpy()})
    np.testing.assert_allclose(found[0], logits.numpy(), rtol=0, atol=2e-6 * float(logits.abs().max()))
    np.testing.assert_array_equal(found[1], best.numpy())


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_casts_everything(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    model = random_model("convolutions", 1)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    done = export_onnx_model(model, NETWORKS["convolutions"].specs, tmp_path / "m.onnx", dtype=dtype)
    assert [spec.dtype for spec in done.specs] == [str(kind).removeprefix("torch.")]
    assert all(torch.equal(model.state_dict()[key], x) for key, x in before.items())
    proto = onnx.load(tmp_path / "m.onnx")
    # Types agree, which the exporter by itself does not see to in bfloat16.
    onnx.checker.check_model(proto, full_check=True)
    expected = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    assert {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)} == {expected}
    values = values_of(tmp_path / "m.onnx")
    assert {x.dtype for x in values.values() if x.is_floating_point()} == {kind}
    assert bits(values["head.weight"]) == bits(before["head.weight"].to(kind))
    assert (tmp_path / "m.onnx").stat().st_size < 8192


def test_float16_runs_and_computes_what_the_model_computes(tmp_path: Path) -> None:
    """To 16 units of float16's last place, at the output's scale."""
    model = random_model("convolutions", 1)
    export_onnx_model(model, NETWORKS["convolutions"].specs, tmp_path / "m.onnx", dtype="fp16")
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        expected = model.double()(x.double())
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})[0]
    assert found.dtype == np.float16
    apart = np.abs(found.astype(np.float64) - expected.numpy()).max() / float(expected.abs().max())
    assert apart <= 16 * 2.0**-11


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).eval()
    model.weight.data[0, 0] = 7e4
    specs = [parse_spec("N,3")]
    with pytest.raises(NonFiniteError, match=r"`weight` holds 7e\+04, too large for --dtype fp16"):
        export_onnx_model(model, specs, tmp_path / "m.onnx", dtype="fp16")
    with pytest.raises(ReparamError, match="--dtype int8: one of fp16, bf16"):
        export_onnx_model(model, specs, tmp_path / "m.onnx", dtype="int8")
    with pytest.raises(ReparamError, match="--opset 20: has no convolutions in bfloat16"):
        export_onnx_model(model, specs, tmp_path / "m.onnx", opset=20, dtype="bf16")
    assert list(tmp_path.iterdir()) == []
    export_onnx_model(model, specs, tmp_path / "m.onnx", dtype="bf16")


def test_the_file_says_where_it_comes_from_and_not_who_made_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.bin"
    checkpoint.write_bytes(b"weights")
    said = provenance([checkpoint], ["gmp", "sp", "gmp"])
    done = export_onnx_model(
        random_model("sequences", 1), NETWORKS["sequences"].specs, tmp_path / "m.onnx", metadata=said
    )
    annotate(tmp_path / "m.onnx", {"reparam.verification": '{"passed": true}'})
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = properties(proto)
    assert found[VERSION] == reparam.__version__
    assert found[SOURCE] == "sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert found[PARAMETERIZATION] == "gmp+sp"
    assert json.loads(found[UNUSED]) == ["unused"] == list(done.unused)
    assert json.loads(found["reparam.verification"]) == {"passed": True}
    assert WeightMap.load(found[KEY]) == done.found.weights
    data = (tmp_path / "m.onnx").read_bytes()
    for trace in (
        b'File "',
        b"pkg.",
        b"class_hierarchy",
        str(Path(__file__).parent).encode(),
        b"site-packages",
    ):
        assert trace not in data


def test_values_beside_the_file_are_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own saving moves large models outside by itself, under a name of the moment.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    model, specs = random_model("convolutions", 1), NETWORKS["convolutions"].specs
    inside, outside = tmp_path / "inside.onnx", tmp_path / "outside.onnx"
    assert export_onnx_model(model, specs, inside).data is None
    size = sum(x.nbytes for x in values_of(inside).values())
    assert export_onnx_model(model, specs, inside, largest=size).data is None
    with staged(outside) as temporary:
        done = export_onnx_model(model, specs, temporary, target=outside, largest=size - 1)
    assert done.data is not None
    assert re.fullmatch(r"outside-[0-9a-f]{16}\.data", done.data.name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([inside.name, outside.name, done.data.name])
    found, expected = values_of(outside), values_of(inside)
    assert {key: bits(x) for key, x in found.items()} == {key: bits(x) for key, x in expected.items()}
    assert outside.stat().st_size < inside.stat().st_size
    onnx.checker.check_model(outside, full_check=True)
    x = {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)}
    ran = [
        onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, x)
        for p in (inside, outside)
    ]
    np.testing.assert_array_equal(ran[0][0], ran[1][0])
    again = export_onnx_model(random_model("convolutions", 2), specs, outside, largest=0)
    assert again.data != done.data


KILLED = """
import os, sys
from pathlib import Path
from torch import nn
import reparam.export.onnx as exporting
from reparam.checkpoint.staging import staged
from reparam.graph import parse_spec
from reparam.onnxfile.external import DataWriter

def die(*args, **kwargs):
    os._exit(9)

if sys.argv[2] == "data":
    DataWriter.finish = die
else:
    exporting.ir.save = die
target = Path(sys.argv[1])
with staged(target) as temporary:
    model = nn.Linear(64, 64).eval()
    exporting.export_onnx_model(model, [parse_spec("N,64")], temporary, target=target, largest=0)
"""


@pytest.mark.parametrize("moment", ["data", "graph"])
def test_a_killed_export_leaves_nothing_under_the_name(moment: str, tmp_path: Path) -> None:
    """Killed while the data is written, or between it and the graph; the next run cleans up and succeeds."""
    target = tmp_path / "m.onnx"
    ran = python(KILLED, target, moment)
    assert ran.returncode == 9, ran.stderr
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].endswith(".partial" if moment == "data" else ".data")
    model = nn.Linear(64, 64).eval()
    with staged(target) as temporary:
        done = export_onnx_model(model, [parse_spec("N,64")], temporary, target=target, largest=0)
    assert done.data is not None
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    assert bits(values_of(target)["weight"]) == bits(model.weight)


def test_a_full_disk_leaves_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reparam.onnxfile.external.DataWriter._append", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx_model(nn.Linear(64, 64).eval(), [parse_spec("N,64")], tmp_path / "m.onnx", largest=0)
    assert list(tmp_path.iterdir()) == []
