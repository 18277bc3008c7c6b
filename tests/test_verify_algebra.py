"""The graph of a file against the original in float64: numbers as code and file have them, and at what cost."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.errors import CheckFailedError
from reparam.export import export_onnx_model
from reparam.graph import convert, fold, parse_spec
from reparam.verification import algebra, exact, verify_onnx

SPECS = [parse_spec("x=float32[N,4]")]
IMAGES = [parse_spec("x=float32[N,3,6,6]")]


def network() -> nn.Module:
    """Its batch norm has an ε that float32 rounds, which the exporter folds into the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape) * 0.1)
    return model.eval()


def test_a_graph_without_rounded_numbers_needs_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the original gave is there already; and so the graph is held to its ε, not to one in float32."""
    converted = convert(network(), "gmp")
    folded = fold(converted)
    done = export_onnx_model(folded, IMAGES, tmp_path / "m.onnx")

    def again(*args: object) -> None:
        raise AssertionError("the folded model is run again")

    monkeypatch.setattr(algebra, "run", again)
    report = verify_onnx(converted, folded, tmp_path / "m.onnx", IMAGES, done.found.weights)
    assert report.passed, report.lines()
    assert [check.name for check in report.proof("algebra")] == ["folded model", "graph"]
    assert not [note for note in report.notes if note.startswith("algebra")]


class Leaky(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.linear, self.slope = nn.Linear(4, 3, bias=False), slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.linear(x), self.slope)


@pytest.mark.parametrize("given", [True, False], ids=["given", "by default"])
@pytest.mark.parametrize(
    ("slope", "passes"), [(0.01, True), (0.01 * (1 + 2.0**-30), True), (0.010001, False)]
)
def test_numbers_of_operators_are_held_to_float32(
    given: bool, slope: float, passes: bool, tmp_path: Path
) -> None:
    """A slope stands in the file, or is the operator's own: either way only its rounding is allowed."""
    torch.manual_seed(0)
    model = Leaky(slope)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("LeakyRelu", ["z"], ["y"], **({"alpha": 0.01} if given else {})),
    ]
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.ascontiguousarray(model.linear.weight.detach().numpy().T), "w")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "m.onnx",
    )
    found = {c.name: c.passed for c in verify_onnx(model, model, tmp_path / "m.onnx", SPECS).proof("algebra")}
    assert found == {"graph": passes}


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_convolutions_unfold_as_many_images_as_there_are_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, sizes, whole = torch.randn(5, 3, 6, 6), [], torch.ops.aten.convolution.default
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2))
    wide = exact.in_float64(model)
    with torch.no_grad():
        expected = wide(x.double())

    def noted(piece: Tensor, *how: object) -> Tensor:
        sizes.append(len(piece))
        return whole(piece, *how)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(exact.run(wide, [x], exact.Float64()).outputs[0], expected)
    monkeypatch.setattr(exact, "_CONVOLUTION", noted)
    exact._convolve(x, model[0].weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert max(sizes) <= threads
    assert sum(sizes) == 5


def test_the_folded_model_stays_as_it_is(tmp_path: Path) -> None:
    """Though in training mode, where it drops values, and though the file has another type."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).eval()
    done = export_onnx_model(model, SPECS, tmp_path / "m.onnx", dtype="fp16")
    folded = nn.Sequential(*model).train()
    before = {key: value.clone() for key, value in folded.state_dict().items()}
    assert verify_onnx(model, folded, tmp_path / "m.onnx", done.specs, done.found.weights).passed
    assert all(module.training for module in folded.modules())
    for key, value in folded.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])


def test_a_layer_at_fault_is_found_in_evaluation_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).eval()
    done = export_onnx_model(model, SPECS, tmp_path / "m.onnx")
    file = onnx.load(tmp_path / "m.onnx")
    next(node for node in file.graph.node if node.op_type == "Tanh").op_type = "Erf"
    onnx.save(file, tmp_path / "m.onnx")
    folded = nn.Sequential(*model).train()
    report = verify_onnx(model, folded, tmp_path / "m.onnx", SPECS, done.found.weights)
    assert (report.passed, report.diverges) == (False, "3.weight")


@pytest.mark.parametrize("collects", [True, False])
def test_cycles_are_not_collected_during_an_export(collects: bool, tmp_path: Path) -> None:
    """And afterwards as before, whether or not the model can be exported."""
    seen: list[bool] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.isenabled())
            if len(seen) > 1 and self.out_features == 1:
                raise ValueError("refused")
            return super().forward(x)

    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        export_onnx_model(Watched(4, 3).eval(), SPECS, tmp_path / "m.onnx")
        assert gc.isenabled() is collects
        assert len(seen) > 1
        assert not any(seen)
        seen.clear()
        with pytest.raises(CheckFailedError):
            export_onnx_model(Watched(4, 1).eval(), SPECS, tmp_path / "m.onnx")
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()
