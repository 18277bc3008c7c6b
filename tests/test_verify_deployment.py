"""The file in ONNX Runtime against the original: what tolerances are, and what no tolerance excuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployment_cases import MATMUL, ROWS, WEIGHT, Net, graph, linear, names, to
from onnx import TensorProto, helper
from torch import Tensor, nn

from reparam.graph import InputSpec, convert
from reparam.verification import Tolerance, compare_onnx, runtime
from reparam.verification.exact import Float64, in_float64, run

#: float64 against float64
EXACT = 1e-15
#: float32, and no parameter: `double()` does not reach it
HELD = torch.linspace(-0.3, 0.4, 4)


def test_a_right_file_passes_and_says_by_how_much(tmp_path: Path) -> None:
    report = compare_onnx(Net(linear), graph(to("Identity"), tmp_path / "m.onnx"), ROWS)
    assert report.passed, report.lines()
    assert names(report) == ["largest error", "rms error"]
    assert all(check.proof == "deployment" for check in report.checks)


def test_a_cast_inside_the_model_does_not_narrow_the_reference() -> None:
    def narrow(x: Tensor, weight: Tensor) -> Tensor:
        table = torch.zeros(4, dtype=torch.float32) + torch.ones(4).to(torch.float16)
        table = table + torch.exp(HELD) - 1
        return torch.softmax((x.float() * table.type_as(x)) @ weight.float().T, -1, dtype=torch.float32)

    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mode = Float64()
    got = run(in_float64(Net(narrow)), [x], mode).outputs[0]
    assert got.dtype == torch.float64
    assert mode.widened > 0
    want = torch.softmax((x * HELD.double().exp()) @ WEIGHT.double().T, -1)
    assert float((got - want).abs().max()) <= EXACT


def test_a_cast_inside_the_model_is_noted(tmp_path: Path) -> None:
    path = graph(to("Identity"), tmp_path / "m.onnx")
    report = compare_onnx(Net(lambda x, w: linear(x.float(), w)), path, ROWS)
    assert report.passed
    assert any("narrower type" in note for note in report.notes)
    assert not any("narrower type" in note for note in compare_onnx(Net(linear), path, ROWS).notes)


def nearly_tied(x: Tensor, weight: Tensor) -> Tensor:
    """The two largest differ by what float32 cannot see, and x decides which."""
    return torch.stack([x.sum(1) + 1e6, x.sum(1) + 1e6 + 1e-4 * x[:, 0], x[:, 1]], 1)


def test_indices_may_differ_where_the_original_cannot_tell(tmp_path: Path) -> None:
    """One adds in float64 and finds the tie, the file does not."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "one"], ["s"], keepdims=1),
        helper.make_node("Add", ["s", "million"], ["a"]),
        helper.make_node("Gather", ["x", "first"], ["x0"], axis=1),
        helper.make_node("Gather", ["x", "one"], ["x1"], axis=1),
        helper.make_node("Mul", ["x0", "small"], ["d"]),
        helper.make_node("Add", ["a", "d"], ["b"]),
        helper.make_node("Concat", ["a", "b", "x1"], ["all"], axis=1),
        helper.make_node("ArgMax", ["all"], ["y"], axis=1, keepdims=0),
    ]
    constants = {
        "one": np.array([1]), "first": np.array([0]), "million": np.float32([[1e6]]), "small": np.float32([[1e-4]])
    }  # fmt: skip
    path = graph(nodes, tmp_path / "m.onnx", [("y", TensorProto.INT64)], constants=constants)
    report = compare_onnx(Net(lambda x, w: nearly_tied(x, w).argmax(1)), path, ROWS)
    assert report.passed, report.lines()
    assert "cannot tell them apart" in str(report.checks[0].where)


DECISIONS: dict[str, tuple[Callable[[Tensor, Tensor], object], list[onnx.NodeProto], int]] = {
    "argmax": (lambda x, w: linear(x, w).argmax(1), to("ArgMin", axis=1, keepdims=0), TensorProto.INT64),
    "truth": (lambda x, w: linear(x, w) > 0, to("Less", "zero"), TensorProto.BOOL),
    "threshold": (lambda x, w: linear(x, w) > 0, to("Greater", "little"), TensorProto.BOOL),
    "top": (
        lambda x, w: linear(x, w).topk(2)[1],
        [MATMUL, helper.make_node("TopK", ["z", "two"], ["v", "y"], largest=0)],
        TensorProto.INT64,
    ),
    "cast": (lambda x, w: linear(x, w).argmax(1).int(), [
        MATMUL, helper.make_node("ArgMin", ["z"], ["i"], axis=1, keepdims=0),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.INT32)], TensorProto.INT32),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECISIONS)
def test_indices_and_truth_values_that_are_wrong_fail(kind: str, tmp_path: Path) -> None:
    function, nodes, output = DECISIONS[kind]
    constants = {"zero": np.float32(0), "little": np.float32(0.5), "two": np.array([2])}
    path = graph(nodes, tmp_path / "m.onnx", [("y", output)], constants=constants)
    assert names(compare_onnx(Net(function), path, ROWS)) == ["equal"]
    assert not compare_onnx(Net(function), path, ROWS).passed


def test_all_nan_does_not_pass_though_both_are(tmp_path: Path) -> None:
    path = graph(to("Mul", "nan"), tmp_path / "m.onnx", constants={"nan": np.float32(math.nan)})
    report = compare_onnx(Net(lambda x, w: linear(x, w) * math.nan), path, ROWS)
    assert names(report) == ["finite"]
    assert not report.passed


def test_shapes_that_broadcast_do_not_pass(tmp_path: Path) -> None:
    path = graph(to("ReduceMax", "rows", keepdims=1), tmp_path / "m.onnx", constants={"rows": np.array([0])})
    report = compare_onnx(Net(linear), path, [InputSpec("x", ("N", 4))])
    assert names(report) == ["shape"]


def test_a_model_that_changed_after_capture_fails(tmp_path: Path) -> None:
    model, path = Net(linear), graph(to("Identity"), tmp_path / "m.onnx")
    assert compare_onnx(model, path, ROWS).passed
    with torch.no_grad():
        model.weight[0, 0] += 1e-4
    assert [check.name for check in compare_onnx(model, path, ROWS).failures] == [
        "largest error",
        "rms error",
    ]


def test_verifying_leaves_the_model_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compare_onnx(model, graph(to("Identity"), tmp_path / "m.onnx"), ROWS)
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([MATMUL, helper.make_node("Dropout", ["z", "half", "yes"], ["y"])], "Dropout"),
        (
            [MATMUL, helper.make_node("RandomNormalLike", ["z"], ["r"]), helper.make_node("Mul", ["r", "none"], ["q"]),
             helper.make_node("Add", ["z", "q"], ["y"])],
            "random",
        ),
        (
            [MATMUL, helper.make_node("BatchNormalization", ["z", "c", "c", "c", "c"], ["y", "m", "v"], training_mode=1)],
            "batch",
        ),
    ],
)  # fmt: skip
def test_training_mode_fails(nodes: list[onnx.NodeProto], told: str, tmp_path: Path) -> None:
    constants = {
        "half": np.float32(0.5),
        "yes": np.array(True),
        "none": np.float32(0),
        "c": np.ones(3, np.float32),
    }
    report = compare_onnx(Net(linear), graph(nodes, tmp_path / "m.onnx", constants=constants), ROWS)
    assert names(report) == ["evaluation mode"]
    assert told in str(report.checks[0].where)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (InputSpec("y", ("N", 4)), "inputs"),
        (InputSpec("x", ("N", 4), "int64"), "inputs"),
        (InputSpec("x", ("N", 4, 1)), "inputs"),
        (InputSpec("x", ("N", 5)), "inputs"),
        (InputSpec("x", ("N", "C")), "dynamic axes"),
    ],
)
def test_inputs_that_are_not_as_expected(spec: InputSpec, name: str, tmp_path: Path) -> None:
    assert names(compare_onnx(Net(linear), graph(to("Identity"), tmp_path / "m.onnx"), [spec])) == [name]


def test_outputs_have_their_names_order_and_number(tmp_path: Path) -> None:
    model = Net(lambda x, w: (linear(x, w), linear(x, w) * 2))
    nodes = [MATMUL, helper.make_node("Identity", ["z"], ["a"]), helper.make_node("Add", ["z", "z"], ["b"])]
    given = [("a", TensorProto.FLOAT), ("b", TensorProto.FLOAT)]
    right = graph(nodes, tmp_path / "right.onnx", given)
    assert compare_onnx(model, right, ROWS, outputs=["a", "b"]).passed
    assert names(compare_onnx(model, right, ROWS, outputs=["b", "a"])) == ["outputs"]
    wrong = graph(nodes, tmp_path / "wrong.onnx", given[::-1])
    assert not compare_onnx(model, wrong, ROWS).passed
    one = graph(nodes, tmp_path / "one.onnx", given[:1])
    assert names(compare_onnx(model, one, ROWS)) == ["outputs"]


def test_swapped_outputs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    model = Net(lambda x, w: (linear(x, w), linear(x, w).argmax(1), linear(x, w).sum(1)))
    nodes = [MATMUL, helper.make_node("Identity", ["z"], ["a"]), helper.make_node("ArgMax", ["z"], ["b"], axis=1,
             keepdims=0), helper.make_node("ReduceSum", ["z", "axes"], ["c"], keepdims=0)]  # fmt: skip
    given = [("c", TensorProto.FLOAT), ("b", TensorProto.INT64), ("a", TensorProto.FLOAT)]
    path = graph(nodes, tmp_path / "m.onnx", given, constants={"axes": np.array([1])})
    assert names(compare_onnx(model, path, ROWS)) == ["shape"]


def test_the_user_says_what_is_near_enough(tmp_path: Path) -> None:
    path = graph(to("Mul", "more"), tmp_path / "m.onnx", constants={"more": np.float32(1.001)})
    assert not compare_onnx(Net(linear), path, ROWS).passed
    assert compare_onnx(Net(linear), path, ROWS, tolerance=Tolerance(rtol=2e-3)).passed
    assert not compare_onnx(Net(linear), path, ROWS, tolerance=Tolerance(rtol=5e-4)).passed
    assert compare_onnx(Net(linear), path, ROWS, tolerances={"y": Tolerance(rtol=2e-3)}).passed
    loose, tight = Tolerance(rtol=2e-3), {"y": Tolerance(rtol=1e-6)}
    assert not compare_onnx(Net(linear), path, ROWS, tolerance=loose, tolerances=tight).passed
    assert names(compare_onnx(Net(linear), path, ROWS, tolerances={"z": loose})) == ["outputs"]


def test_half_precision_is_judged_by_the_original_in_half_precision(tmp_path: Path) -> None:
    kind = TensorProto.FLOAT16
    path = graph(to("Identity"), tmp_path / "m.onnx", [("y", kind)], [("x", kind, ["N", 4])])
    report = compare_onnx(Net(linear), path, ROWS)
    assert report.passed, report.lines()
    assert 1e-4 < float(report.checks[0].noise_floor or 0) < 1e-2
    wrong = graph(to("Mul", "more"), tmp_path / "w.onnx", [("y", kind)], [("x", kind, ["N", 4])],
                  {"more": np.float16(1.02)})  # fmt: skip
    assert not compare_onnx(Net(linear), wrong, ROWS).passed


def test_angles_are_no_wider_than_the_weights_they_hold(tmp_path: Path) -> None:
    """A float32 file of a float16 network is judged in float32, whatever holds the network's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).eval().half()
    weight = model[0].weight.detach().float().T.numpy()
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = graph(nodes, tmp_path / "m.onnx", constants={"w": weight})
    for original in (model, convert(model, to="gmp", include=["*"])):
        report = compare_onnx(original, path, ROWS)
        assert report.passed, report.lines()
        assert all((check.noise_floor or 0) < 1e-5 for check in report.checks)


def test_an_original_that_overflows_at_the_deployed_type_is_no_fault_of_the_file(tmp_path: Path) -> None:
    kind = TensorProto.FLOAT16
    path = graph(to("Mul", "much"), tmp_path / "m.onnx", [("y", kind)], [("x", kind, ["N", 4])],
                 {"much": np.float16(3000)})  # fmt: skip
    report = compare_onnx(Net(lambda x, w: linear(x, w) * 3000), path, ROWS)
    assert report.passed, report.lines()
    assert any("overflows" in note for note in report.notes)


FIRST_ROW_ALONE = [
    helper.make_node("Gather", ["s", "first"], ["s0"], axis=0),
    helper.make_node("Shape", ["s"], ["like"]),
    helper.make_node("Expand", ["s0", "like"], ["sums"]),
]


@pytest.mark.parametrize("right", [True, False])
def test_every_size_is_compared_though_the_original_overflows_on_loud_inputs(
    right: bool, tmp_path: Path
) -> None:
    """Batch 1 is quiet and gives 1000 values, 2 and 3 overflow: they are compared at batch 1's loudness.

    What was left out counts for nothing, so the spare inputs of its loudness are tried too.
    """
    given: list[int] = []

    def wide(x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            given.append(len(x))
        return x.abs().sum(1, keepdim=True) * torch.full((1000,), 5e4).to(x)

    kind = TensorProto.FLOAT16
    nodes = [
        helper.make_node("ReduceL1", ["x", "one"], ["s"]),
        *([helper.make_node("Identity", ["s"], ["sums"])] if right else FIRST_ROW_ALONE),
        helper.make_node("Mul", ["sums", "much"], ["y"]),
    ]
    constants = {"one": np.array([1]), "first": np.array([0]), "much": np.full((1, 1000), 5e4, np.float16)}
    path = graph(nodes, tmp_path / "m.onnx", [("y", kind)], [("x", kind, ["N", 4])], constants)
    report = compare_onnx(Net(wide), path, ROWS)
    assert report.passed == right, report.lines()
    if right:
        assert sorted(given) == [1, 2, 2, 3, 3, 7, 9]
        assert sum("overflows" in note for note in report.notes) == 4
    else:
        assert "4] at scale 0.1" in str(report.failures[0].where)


def test_sizes_that_the_original_overflows_at_are_not_compared(tmp_path: Path) -> None:
    """Where one is left the axis may be fixed; real inputs count."""
    kind = TensorProto.FLOAT16
    path = graph(to("Identity"), tmp_path / "m.onnx", [("y", kind)], [("x", kind, ["N", 4])])
    model = Net(lambda x, w: linear(x, w) * (1 if len(x) in (1, 5) else 1e6))
    report = compare_onnx(model, path, ROWS)
    assert [check.name for check in report.failures] == ["dynamic axes"]
    assert "output y was compared at N=1 alone" in str(report.checks[0].where)
    real = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    report = compare_onnx(model, path, ROWS, data=[(real,)])
    assert report.passed, report.lines()
    report = compare_onnx(Net(lambda x, w: linear(x, w) * 1e8), path, ROWS)
    assert [check.name for check in report.failures] == ["compared"]


def test_a_provider_that_does_not_load_is_not_replaced(tmp_path: Path) -> None:
    path = graph(to("Identity"), tmp_path / "m.onnx")
    if runtime.cuda_obstacle() is not None:
        assert any(note.startswith("CUDA: not run") for note in compare_onnx(Net(linear), path, ROWS).notes)
    with pytest.raises(runtime.RuntimeFailed):
        runtime.open_session(onnx.load(path), path, provider="NoSuchExecutionProvider")


def test_an_unsupported_operator_and_a_file_that_is_none(tmp_path: Path) -> None:
    path = graph([helper.make_node("Nope", ["x"], ["y"])], tmp_path / "m.onnx")
    assert names(compare_onnx(Net(linear), path, ROWS)) == ["loads in ONNX Runtime"]
    (tmp_path / "bad.onnx").write_bytes(b"\x07not a graph")
    assert names(compare_onnx(Net(linear), tmp_path / "bad.onnx", ROWS)) == ["loads in ONNX Runtime"]
