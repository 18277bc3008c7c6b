"""Outputs that are no plain numbers: indices and truth values, probabilities and their logits, names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployment_cases import MATMUL, ROWS, Net, graph, linear, names, to
from onnx import TensorProto, helper
from torch import Tensor

from reparam.verification import Report, Tolerance, compare_onnx, exact, verify_onnx
from reparam.verification.decisions import Decision
from reparam.verification.logits import logits_of

INT64, BOOL, FLOAT = TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT
#: the largest of three is the first by 0.1
SCORES = torch.tensor([[1.0, 0.9, 0.5]])


def picked(*indices: int, k: int | None = None) -> Tensor:
    return torch.tensor([list(indices)]) if k else torch.tensor(indices)


def test_the_margin_of_an_index_is_how_much_less_its_number_is() -> None:
    best = Decision(SCORES.argmax(1), SCORES, axis=1)
    assert best.margin(picked(1)).tolist() == [pytest.approx(0.1, rel=1e-6)]
    assert best.margin(picked(2)).tolist() == [0.5]
    assert best.margin(picked(3)).tolist() == best.margin(picked(-1)).tolist() == [torch.inf]
    whole = Decision(SCORES.argmax(), SCORES)
    assert whole.margin(torch.tensor(2)).item() == 0.5


def test_of_the_top_none_may_be_picked_twice() -> None:
    tied = torch.tensor([[2.0, 2.0, 1.0]])
    top = Decision(tied.topk(2).indices, tied, axis=1)
    assert top.margin(picked(0, 1, k=2)).tolist() == top.margin(picked(1, 0, k=2)).tolist() == [[0, 0]]
    assert top.margin(picked(1, 1, k=2)).tolist() == [[torch.inf] * 2]


def test_the_margin_of_a_truth_value_is_its_distance_from_the_threshold() -> None:
    above = Decision(SCORES > 0.75, SCORES.double(), 0.75)
    assert above.margin(~(SCORES > 0.75)).tolist() == [pytest.approx([0.25, 0.15, 0.25], rel=1e-6)]
    infinite = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert Decision(infinite > infinite, infinite, infinite).margin(infinite > 0).tolist() == [
        0,
        0,
        torch.inf,
    ]


def test_what_was_not_picked_does_not_excuse() -> None:
    """A mask's numbers are as large as can be, and rounded by as much."""
    for mask in (-1e9, torch.finfo(torch.float64).min, -torch.inf):
        y, f = torch.tensor([[1.0, 0.9, mask]], dtype=torch.float64), torch.tensor([[1.001, 0.9, -1e30]])
        error = Decision(y.argmax(1), y, axis=1).error(Decision(f.argmax(1), f, axis=1))
        assert error == pytest.approx(1e-3, rel=1e-3)


def test_both_sides_of_a_comparison_are_rounded() -> None:
    left, right = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    own = Decision(left > right, left + 0.25, right + 0.5)
    assert Decision(left > right, left, right).error(own) == 0.75


def test_a_decision_of_other_numbers_does_not_excuse() -> None:
    left = torch.ones(3, dtype=torch.float64)
    decision = Decision(left > 0, left, 0.0)
    others = Decision(left[:2] > 9, left[:2] + 9, 9.0), Decision(left > left, left + 9, left), None
    assert [decision.error(other) for other in others] == [0.0, 0.0, 0.0]
    assert decision.error(Decision(left > 0, left + 9, 0.0)) == 9.0


def ids(nodes: list[onnx.NodeProto], path: Path, kind: int = INT64) -> Path:
    return graph([MATMUL, *nodes], path, [("y", kind)], constants=CONSTANTS)


def made(op: str, *inputs: str, out: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [out], **attributes)


CONSTANTS = {
    "two": np.array([2]), "less": np.float32([[0, -1e-6, 0]]), "more": np.float32([[0, 3e-1, 0]]),
    "mask": np.float32([[0, 0, -1e9]]),
}  # fmt: skip
#: the first column of an input
FIRST = {"zero": np.array([0, 0]), "one": np.array([1000, 1])}


def nudged(op: str, by: str, **attributes: object) -> list[onnx.NodeProto]:
    last = "TopK" if op == "TopK" else op
    inputs = ["n", "two"] if op == "TopK" else ["n"]
    return [made("Add", "z", by, out="n"), helper.make_node(last, inputs, ["v", "y"] if op == "TopK" else ["y"], **attributes)]  # fmt: skip


def clamped(x: Tensor, weight: Tensor) -> Tensor:
    """A comparison more at the narrow type, of numbers far from those that decide."""
    high = linear(x, weight) + 100
    if high.dtype != torch.float64:
        high = torch.where(high > 1e4, 1e4, high)
    return high - 100 > 0.0


def compared(by: str) -> list[onnx.NodeProto]:
    return [made("Add", "z", by, out="n"), made("Sub", "z", "z", out="o"), made("Greater", "n", "o")]


#: kind -> (original, decided by the scores plus ..., element type of the result)
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], object], Callable[[str], list[onnx.NodeProto]], int]] = {
    "argmax": (lambda x, w: linear(x, w).argmax(1), lambda by: nudged("ArgMax", by, axis=1, keepdims=0), INT64),
    "argmin": (lambda x, w: linear(x, w).argmin(1), lambda by: nudged("ArgMin", by, axis=1, keepdims=0), INT64),
    "maximum": (
        lambda x, w: linear(x, w).max(1, keepdim=True)[1], lambda by: nudged("ArgMax", by, axis=1, keepdims=1), INT64),
    "top": (lambda x, w: linear(x, w).topk(2)[1], lambda by: nudged("TopK", by), INT64),
    "truth": (lambda x, w: linear(x, w) > 0, compared, BOOL),
    "clamped": (clamped, compared, BOOL),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_follow_their_numbers(kind: str, tmp_path: Path) -> None:
    """Scores moved by 0.3 decide otherwise somewhere; by 1e-6 they do nowhere on these inputs."""
    function, nodes, output = KINDS[kind]
    report = compare_onnx(Net(function), ids(nodes("more"), tmp_path / "m.onnx", output), ROWS)
    assert [(check.name, check.passed) for check in report.checks] == [("equal", False)]
    assert (report.checks[0].max_abs or 0) > 1e-4
    assert compare_onnx(Net(function), ids(nodes("less"), tmp_path / "n.onnx", output), ROWS).passed


@pytest.mark.parametrize(
    ("function", "right", "wrong", "kind"),
    [
        (lambda x, w: linear(x, w).argmax(1), "ArgMax", "ArgMin", INT64),
        (lambda x, w: linear(x, w) > x[:, :1], "Greater", "Less", BOOL),
    ],
)
def test_a_file_that_gives_no_floats_is_proved_by_what_it_decides(
    function: Callable[[Tensor, Tensor], object], right: str, wrong: str, kind: int, tmp_path: Path
) -> None:
    for op in (right, wrong):
        if kind == BOOL:
            nodes = [made("Slice", "x", "zero", "one", out="c"), made(op, "z", "c")]
        else:
            nodes = [made(op, "z", axis=1, keepdims=0)]
        path = graph([MATMUL, *nodes], tmp_path / f"{op}.onnx", [("y", kind)], constants=FIRST)
        report = verify_onnx(Net(function), None, path, ROWS)
        assert report.passed == (op == right), report.lines()
        assert [check.passed for check in report.proof("algebra")] == [op == right]
        assert any("no output is a floating number" in note for note in report.notes) == (op == right)


def test_a_masked_score_is_never_the_best(tmp_path: Path) -> None:
    """The mask is 10⁹ times what the scores are; the file picks among the two others wrongly."""
    model = Net(lambda x, w: (linear(x, w) + torch.tensor([0, 0, -1e9])).argmax(1))
    right = [made("Add", "z", "mask", out="n"), made("ArgMax", "n", axis=1, keepdims=0)]
    assert compare_onnx(model, ids(right, tmp_path / "m.onnx"), ROWS).passed
    wrong = [made("Add", "z", "mask", out="m"), made("Add", "m", "more", out="n"), right[1]]
    assert names(compare_onnx(model, ids(wrong, tmp_path / "w.onnx"), ROWS)) == ["equal"]


def noisy_threshold(x: Tensor, weight: Tensor) -> Tensor:
    """x against itself plus what float32 cannot see beside 10⁵: which is larger, rounding says."""
    return x > x + linear(x, weight).sum(1, keepdim=True) + 1e5 - linear(x, weight).sum(1, keepdim=True) - 1e5


def test_a_threshold_that_is_rounded_excuses_too(tmp_path: Path) -> None:
    nodes = [
        made("ReduceSum", "z", "axes", out="s", keepdims=1), made("Add", "x", "s", out="a"),
        made("Add", "a", "big", out="b"), made("Sub", "b", "s", out="c"), made("Sub", "c", "big", out="d"),
        made("Greater", "x", "d"),
    ]  # fmt: skip
    constants = {"axes": np.array([1]), "big": np.float32(1e5)}
    path = graph([MATMUL, *nodes], tmp_path / "m.onnx", [("y", BOOL)], constants=constants)
    report = compare_onnx(Net(noisy_threshold), path, ROWS)
    assert report.passed, report.lines()
    assert "cannot tell them apart" in str(report.checks[0].where)


# Probabilities.


SURE = 1e4
PROBABILITIES: dict[str, tuple[Callable[[Tensor, Tensor], object], list[onnx.NodeProto]]] = {
    "softmax": (lambda x, w: torch.softmax(linear(x, w) * SURE, 1), [made("Softmax", "s", axis=1)]),
    "log": (lambda x, w: torch.log_softmax(linear(x, w), 1), [made("LogSoftmax", "s", axis=1)]),
    "sigmoid": (lambda x, w: torch.sigmoid(linear(x, w) * SURE), [made("Sigmoid", "s")]),
    "cast": (
        lambda x, w: torch.softmax(linear(x, w) * SURE, 1, dtype=torch.float32).to(x.dtype),
        [made("Softmax", "s", out="p", axis=1), made("Cast", "p", to=FLOAT)],
    ),
}


def sure(kind: str, path: Path, scale: float = 1.0, output: str = "y") -> Path:
    """The file of such a network, its logits times ``scale``."""
    factor = np.float32(scale * (1 if kind == "log" else SURE))
    nodes = [MATMUL, made("Mul", "z", "factor", out="s"), *PROBABILITIES[kind][1]]
    return graph(nodes, path, [(output, FLOAT)], constants={"factor": factor})


def logits_checks(report: Report) -> list[bool]:
    return [check.passed for check in report.checks if "logits" in str(check.where)]


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_logits_are_held_to_the_original_too(kind: str, tmp_path: Path) -> None:
    model = Net(PROBABILITIES[kind][0])
    report = compare_onnx(model, sure(kind, tmp_path / "m.onnx"), ROWS)
    assert report.passed, report.lines()
    assert logits_checks(report) == [True, True]
    assert len(report.checks) == 4
    wrong = compare_onnx(model, sure(kind, tmp_path / "w.onnx", 1 + 1e-4), ROWS)
    assert logits_checks(wrong) == [False, False]


def test_a_network_that_is_sure_of_itself_hides_its_logits(tmp_path: Path) -> None:
    """On inputs where every class but one has no chance, logits that are 1% off show nowhere else."""
    data = torch.eye(4)[:2] * 100
    model = Net(PROBABILITIES["softmax"][0])
    path = sure("softmax", tmp_path / "m.onnx", 1.01)
    probabilities, logits = (run(data.numpy()) for run in (session(path, "y"), session(path, "s")))
    with torch.no_grad():
        assert np.array_equal(probabilities, model(data).numpy())
    assert not np.allclose(logits, linear(data, model.weight.detach()).numpy() * SURE, rtol=5e-3)
    assert not compare_onnx(model, path, ROWS, data=[(data,)]).passed


def session(path: Path, value: str) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime as ort

    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(value, FLOAT, None))
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(opened.run([value], {"x": x})[0])


def test_a_wrong_softmax_of_right_logits_fails(tmp_path: Path) -> None:
    model = Net(lambda x, w: torch.softmax(linear(x, w), 1))
    report = compare_onnx(model, graph(to("Softmax", axis=0), tmp_path / "m.onnx"), ROWS)
    assert logits_checks(report) == [True, True]
    assert not report.passed


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    """Masked by −∞ on both sides they are left out; in the file alone they are a fault, though no probability shows it."""
    mask = np.float32([[0, 0, -np.inf]])
    nodes = [MATMUL, made("Add", "z", "mask", out="s"), made("Softmax", "s", axis=1)]
    path = graph(nodes, tmp_path / "m.onnx", constants={"mask": mask})
    report = compare_onnx(Net(lambda x, w: (linear(x, w) + torch.tensor(mask)).softmax(1)), path, ROWS)
    assert report.passed, report.lines()
    assert logits_checks(report) == []
    large = torch.tensor([[0, 0, -1e30]])
    report = compare_onnx(Net(lambda x, w: (linear(x, w) + large).softmax(1)), path, ROWS)
    assert names(report) == ["finite"]


def test_where_the_user_says_what_is_near_enough_logits_are_left_out(tmp_path: Path) -> None:
    model = Net(PROBABILITIES["log"][0])
    path = sure("log", tmp_path / "m.onnx", 1.001)
    report = compare_onnx(model, path, ROWS, tolerance=Tolerance(atol=1.0))
    assert report.passed
    assert names(report) == ["within rtol and atol"]


def test_a_softmax_of_the_input_itself_has_no_logits(tmp_path: Path) -> None:
    path = graph([made("Softmax", "x", axis=1)], tmp_path / "m.onnx")
    assert logits_of(onnx.load(path)) == {}
    report = compare_onnx(Net(lambda x, w: x.softmax(1)), path, ROWS)
    assert report.passed
    assert logits_checks(report) == []


def test_no_more_logits_are_kept_than_outputs_need() -> None:
    """Of the many softmaxes of a deep network the results, and what they were taken of, go as they are used up."""

    def deep(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.softmax(x, 1) + 1
        return torch.softmax(linear(x, weight), 1)

    with torch.no_grad():
        recorder = exact.run(Net(deep), [torch.randn(2, 4)])
    assert len(recorder.recorder.logits) == 1


# Names.


def two(path: Path, *given: str) -> Path:
    """Scores and twice the scores, under these names, in this order."""
    nodes = [MATMUL, made("Identity", "z", out=given[0]), made("Add", "z", "z", out=given[1])]
    return graph(nodes, path, [(name, FLOAT) for name in given])


def test_a_file_that_bears_the_originals_names_bears_them_in_its_order(tmp_path: Path) -> None:
    model = Net(lambda x, w: {"scores": linear(x, w), "double": linear(x, w) * 2})
    assert compare_onnx(model, two(tmp_path / "a.onnx", "scores", "double"), ROWS).passed
    assert compare_onnx(model, two(tmp_path / "b.onnx", "linear", "mul"), ROWS).passed  # names of an exporter
    for wrong in (("double", "scores"), ("scores", "mul"), ("linear", "scores")):
        report = compare_onnx(model, two(tmp_path / "w.onnx", *wrong), ROWS)
        assert names(report) == ["outputs"]
        assert "['scores', 'double']" in str(report.checks[0].where)


def test_only_what_has_a_name_is_held_to_it(tmp_path: Path) -> None:
    nested = Net(lambda x, w: {"scores": linear(x, w), "more": (linear(x, w) * 2,)})
    assert compare_onnx(nested, two(tmp_path / "a.onnx", "scores", "anything"), ROWS).passed
    assert names(compare_onnx(nested, two(tmp_path / "b.onnx", "anything", "scores"), ROWS)) == ["outputs"]


def test_numbers_beside_names(tmp_path: Path) -> None:
    """An output the file lacks is a failure before its name is."""
    model = Net(lambda x, w: {"scores": linear(x, w)})
    assert names(compare_onnx(model, two(tmp_path / "a.onnx", "scores", "double"), ROWS)) == ["outputs"]
