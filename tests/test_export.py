"""Input specs, the exporter, the comparison in ONNX Runtime, and faults it must not let through."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import reparam.demo.model as demo_model
import reparam.export
from reparam import pipeline
from reparam.checkpoint import convert_checkpoint
from reparam.errors import ArchitectureError, CheckFailedError, OutputError, ReparamError
from reparam.export import export_onnx_model
from reparam.export.onnx import Exported
from reparam.graph import InputSpec, parse_spec
from reparam.verification import VerificationError, compare_onnx

BUNDLED = Path(demo_model.__file__).parent / "data"
ARCH = "reparam.demo.model:small_cnn"
IMAGE = [InputSpec("input", ("N", 1, 28, 28))]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gmp") / "cnn.gmp.safetensors"
    convert_checkpoint(BUNDLED / "small_cnn.safetensors", to="gmp", output=path)
    return path


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture(scope="module")
def small_onnx(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export_onnx_model(small, SMALL, path)
    return path


SMALL = [InputSpec("x", ("N", 6))]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("N,1,28,28", InputSpec("input", ("N", 1, 28, 28))),
        (" 4 , T ", InputSpec("input", (4, "T"))),
        ("x=float32[N,3,H,W]", InputSpec("x", ("N", 3, "H", "W"))),
        ("ids=int64[N,T]", InputSpec("ids", ("N", "T"), "int64")),
    ],
)
def test_specs(text: str, spec: InputSpec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    "text", ["", "N,,3", "N,0", "N,-1", "x=[3]", "x=float32[]", "x=float32[3", "N 3", "3.5"]
)
def test_bad_specs_name_the_option(text: str) -> None:
    with pytest.raises(ReparamError, match=r"--input .*: "):
        parse_spec(text)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ReparamError, match="element type int4 is none of float32, float16"):
        parse_spec("ids=int4[N,T]")


def test_the_export_is_proven_named_and_clean(
    converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cnn.onnx"
    done = pipeline.export_onnx(converted, ARCH, [parse_spec("pixels=float32[batch,1,28,28]")], out)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [(check.proof, check.name) for check in done.report.checks] == [
        ("weights", "weights"), ("algebra", "folded model"), ("algebra", "graph"),
        ("deployment", "largest error"), ("deployment", "rms error"),
    ]  # fmt: skip
    assert done.report.passed
    assert [file.name for file in tmp_path.iterdir()] == ["cnn.onnx"]
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    assert [value.name for value in graph.input] == ["pixels"]
    dims = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 1, 28, 28]
    assert {node.op_type for node in graph.node}.isdisjoint({"Sin", "Cos", "CumProd", "Mul"})
    assert str(Path(demo_model.__file__).parent).encode() not in out.read_bytes()
    assert b'File "' not in out.read_bytes()


def test_the_report_is_json(converted: Path, tmp_path: Path) -> None:
    done = pipeline.export_onnx(converted, ARCH, IMAGE, tmp_path / "cnn.onnx")
    value = json.loads(json.dumps(done.report.to_json(), allow_nan=False))
    assert value["passed"] is True
    for check in value["checks"]:
        assert set(check) == {
            "name", "passed", "max_abs", "max_rel", "noise_floor", "tolerance", "where", "proof", "runs"
        }  # fmt: skip
    assert value["proofs"] == {"weights": True, "algebra": True, "deployment": True}
    deployed = [check for check in value["checks"] if check["proof"] == "deployment"]
    assert deployed
    for check in deployed:
        assert 0 < check["max_rel"] <= check["tolerance"] < 1e-4
        assert check["noise_floor"] >= 2.0**-24


def test_the_file_says_where_it_comes_from(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "cnn.onnx"
    pipeline.export_onnx(converted, ARCH, IMAGE, out)
    found = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert found["reparam.source"] == f"sha256:{hashlib.sha256(converted.read_bytes()).hexdigest()}"
    assert found["reparam.parameterization"] == "gmp"
    assert json.loads(found["reparam.verification"]) == {"weights": True, "algebra": True, "deployment": True}
    assert "conv1.weight" in json.loads(found["reparam.weights"])


def test_half_precision(converted: Path, tmp_path: Path) -> None:
    done = pipeline.export_onnx(converted, ARCH, IMAGE, tmp_path / "cnn.onnx", dtype="fp16")
    assert done.report.passed
    types = {tensor.data_type for tensor in onnx.load(done.output).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert onnx.TensorProto.FLOAT not in types


Change = Callable[[onnx.ModelProto], None]


def change_weight(name: str, change: Callable[[np.ndarray], None]) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        value = numpy_helper.to_array(tensor).copy()
        change(value)
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return apply


def grow_one(value: np.ndarray) -> None:
    value.flat[np.abs(value).argmax()] *= 1.001


def flip_one(value: np.ndarray) -> None:
    value.flat[np.abs(value).argmax()] *= -1


def nan_one(value: np.ndarray) -> None:
    value.flat[0] = np.nan


def lose_relu(model: onnx.ModelProto) -> None:
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Identity"


def then(op: str, **attributes: object) -> Change:
    """Append an operator to the output."""

    def apply(model: onnx.ModelProto) -> None:
        output = model.graph.output[0]
        last = next(node for node in model.graph.node if output.name in node.output)
        last.output[0] = "inner"
        model.graph.node.append(helper.make_node(op, ["inner"], [output.name], **attributes))
        if op == "Cast":
            output.type.tensor_type.elem_type = attributes["to"]
        else:
            output.type.tensor_type.shape.ClearField("dim")

    return apply


def bake_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


FAULTS: dict[str, tuple[Change, str]] = {
    "one weight grown by 1/1000": (change_weight("2.weight", grow_one), "largest error"),
    "one sign flipped": (change_weight("0.weight", flip_one), "largest error"),
    "one bias off": (change_weight("2.bias", grow_one), "largest error"),
    "a NaN": (change_weight("0.weight", nan_one), "finite"),
    "a missing ReLU": (lose_relu, "largest error"),
    "a softmax too many": (then("Softmax", axis=-1), "largest error"),
    "outputs in another order": (then("Transpose", perm=[1, 0]), "shape"),
    "float64 outputs": (then("Cast", to=TensorProto.DOUBLE), "dtype"),
    "a baked-in batch": (bake_batch, "dynamic axes"),
    "a renamed input": (lambda m: setattr(m.graph.input[0], "name", "y"), "inputs"),
    "an unknown operator": (lambda m: setattr(m.graph.node[0], "op_type", "Nope"), "loads in ONNX Runtime"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(
    fault: str, small: nn.Module, small_onnx: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, name = FAULTS[fault]
    model = onnx.load(small_onnx)
    change(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    report = compare_onnx(small, tmp_path / "faulty.onnx", SMALL)
    assert not report.passed
    assert report.failures[0].name == name
    json.dumps(report.to_json(), allow_nan=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seed", range(5))
def test_clean_files_pass_with_any_seed(seed: int, small: nn.Module, small_onnx: Path) -> None:
    assert compare_onnx(small, small_onnx, SMALL, seed).passed


def test_a_small_fault_beside_a_loud_output_is_not_hidden(tmp_path: Path) -> None:
    """Noise of every scale is judged at its own scale: a constant offset shows where outputs are small."""
    torch.manual_seed(1)
    model = nn.Linear(6, 3, bias=False).eval()
    export_onnx_model(model, SMALL, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    output = proto.graph.output[0].name
    proto.graph.node[-1].output[0] = "inner"
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([1e-6, 0, 0]), "offset"))
    proto.graph.node.append(helper.make_node("Add", ["inner", "offset"], [output]))
    onnx.save(proto, tmp_path / "m.onnx")
    check = compare_onnx(model, tmp_path / "m.onnx", SMALL).failures[0]
    assert check.name == "largest error"
    assert "at scale 0.1" in str(check.where)


class Splits(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
        return {"sum": x + y.sum(dim=1, keepdim=True), "parts": (x * 2, [y.argmax(1), y > 0])}


def test_several_inputs_and_nested_outputs(tmp_path: Path) -> None:
    specs = [parse_spec("x=float32[N,3]"), parse_spec("y=float32[N,T]")]
    export_onnx_model(Splits().eval(), specs, tmp_path / "m.onnx")
    report = compare_onnx(Splits(), tmp_path / "m.onnx", specs)
    assert report.passed, report.failures
    assert [check.name for check in report.checks] == ["largest error", "rms error"] * 2 + ["equal"] * 2


class Infinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.zeros_like(x)


def test_an_original_that_is_not_finite_is_no_reference(tmp_path: Path) -> None:
    export_onnx_model(Infinite().eval(), SMALL, tmp_path / "m.onnx")
    assert [check.name for check in compare_onnx(Infinite(), tmp_path / "m.onnx", SMALL).checks] == ["finite"]


def tampering(change: Change) -> Callable[..., Exported]:
    def export(model: nn.Module, specs: list[InputSpec], path: Path, *args: Any, **options: Any) -> Exported:
        done = export_onnx_model(model, specs, path, *args, **options)
        proto = onnx.load(path)
        change(proto)
        onnx.save(proto, path)
        return done

    return export


@pytest.mark.parametrize("change", [grow_one, nan_one])
def test_a_file_that_differs_never_gets_the_name(
    change: Callable[[np.ndarray], None], converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cnn.onnx"
    out.write_bytes(b"the last good one")
    monkeypatch.setattr(reparam.export, "export_onnx_model", tampering(change_weight("conv2.weight", change)))
    with pytest.raises(VerificationError, match=r"cnn.onnx: not written.*\(cnn.failed.onnx\)") as caught:
        pipeline.export_onnx(converted, ARCH, IMAGE, out, force=True)
    assert isinstance(caught.value, CheckFailedError)
    assert not caught.value.report.passed
    assert out.read_bytes() == b"the last good one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cnn.failed.onnx", "cnn.onnx"]
    onnx.load(tmp_path / "cnn.failed.onnx")


def test_what_cannot_be_exported_leaves_nothing(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "cnn.onnx"
    cases: list[tuple[type[Exception], str, str | None, list[InputSpec]]] = [
        (ArchitectureError, r"`cnn.gmp.safetensors` holds weights, not a network: give --arch", None, IMAGE),
        (ReparamError, "--input is missing", ARCH, []),
        (ReparamError, r"--input: the model does not take \[2, 3, 28, 28\]", ARCH, [parse_spec("N,3,28,28")]),
        (OutputError, "no such folder", ARCH, IMAGE),
        (OutputError, "exists: --force", ARCH, IMAGE),
    ]
    targets = [out, out, out, tmp_path / "none" / "cnn.onnx", converted]
    for (error, message, arch, specs), target in zip(cases, targets, strict=True):
        with pytest.raises(error, match=message):
            pipeline.export_onnx(converted, arch, specs, target)
    assert list(tmp_path.iterdir()) == []


class Baked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(2, 1)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize("model", [Baked(), Branching()], ids=["baked-in axis", "branch on values"])
def test_models_that_cannot_be_captured_fail(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match="the model cannot be exported: ") as caught:
        export_onnx_model(model.eval(), SMALL, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_training_mode_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ReparamError, match=r"training mode \(1\)"):
        export_onnx_model(model, SMALL, tmp_path / "m.onnx")
