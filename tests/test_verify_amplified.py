"""Outputs whose errors are one number's rounding amplified: the original is run more often before a file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployment_cases import Net, graph, linear, to
from onnx import TensorProto, helper
from torch import Tensor

from reparam.graph import InputSpec
from reparam.verification import Report, Tolerance, compare_onnx, own_error
from reparam.verification.own_error import DRAWS
from reparam.verification.pools import Pool
from reparam.verification.samples import Sample

TERMS = 64
ONE = [InputSpec("x", (1, TERMS))]
WEIGHTS = torch.randn(TERMS, generator=torch.Generator().manual_seed(1)) / 3
#: enough values that one input a loudness is taken
SPREAD = torch.linspace(0.5, 1, 1000)
ORDER = np.random.default_rng(0).permutation(TERMS)
#: of inputs at which the original's rounding happens to be small; at SOUND it is as usual
UNLUCKY, SOUND = (17, 21, 51), 0
LOUDNESSES = 3
FLOAT = TensorProto.FLOAT


def amplified(x: Tensor, weight: Tensor) -> Tensor:
    """exp of a sum of tens, whose every rounding is as large in all values; summed by halves, the same anywhere."""
    terms = x * WEIGHTS
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return torch.exp(terms) * SPREAD


def in_another_order(
    path: Path, gain: float = 1.0, *more: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)
) -> Path:
    """The same of the terms in another order, times ``gain``, with ``more`` nodes behind."""
    made, levels = helper.make_node, TERMS.bit_length() - 1
    nodes = [made("Gather", ["x", "order"], ["g"], axis=1), made("Mul", ["g", "weights"], ["t0"])]
    for i in range(levels):
        nodes.append(made("Split", [f"t{i}"], [f"a{i}", f"b{i}"], axis=1, num_outputs=2))
        nodes.append(made("Add", [f"a{i}", f"b{i}"], [f"t{i + 1}"]))
    nodes += [made("Exp", [f"t{levels}"], ["e"]), made("Mul", ["e", "spread"], ["y"]), *more]
    constants = {"one": np.array([1]), "order": ORDER, "weights": WEIGHTS.numpy()[None, ORDER],
                 "spread": SPREAD.numpy()[None] * np.float32(gain)}  # fmt: skip
    return graph(nodes, path, [(name, FLOAT) for name in outputs], [("x", FLOAT, [1, TERMS])], constants)


def noted(function: Callable[[Tensor, Tensor], object]) -> tuple[Net, list[Tensor]]:
    """The network, and what it is given."""
    given: list[Tensor] = []

    def noting(x: Tensor, weight: Tensor) -> object:
        given.append(x)
        return function(x, weight)

    return Net(noting), given


def runs_in(dtype: torch.dtype, given: list[Tensor]) -> int:
    return sum(x.dtype == dtype for x in given)


@pytest.mark.parametrize("seed", UNLUCKY)
def test_a_right_file_is_not_refused_by_chance(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_another_order(tmp_path / "m.onnx")
    report = compare_onnx(Net(amplified), path, ONE, seed)
    assert report.passed, report.lines()
    runs = LOUDNESSES * (1 + DRAWS)
    assert [check.runs for check in report.checks] == [runs] * 2
    assert all(f"x the original's own error in {runs} runs (at most" in str(check) for check in report.checks)
    monkeypatch.setattr(own_error, "DRAWS", 0)
    alone = compare_onnx(Net(amplified), path, ONE, seed)
    assert [check.name for check in alone.failures][-1] == "rms error"
    # The file's own errors are those of one run still.
    assert [check.max_rel for check in report.checks] == [check.max_rel for check in alone.checks]


def test_of_forty_inputs_none_refuses_a_right_file(tmp_path: Path) -> None:
    """Of four hundred by one run of each 48 do, by seventeen one."""
    path = in_another_order(tmp_path / "m.onnx")
    reports = [compare_onnx(Net(amplified), path, ONE, seed) for seed in range(40)]
    assert all(report.passed for report in reports)
    again = [report.checks[0].runs is not None for report in reports]
    assert 2 <= sum(again) <= 10, again


@pytest.mark.parametrize("seed", [SOUND, *UNLUCKY])
def test_a_wrong_file_is_refused_all_the_same(seed: int, tmp_path: Path) -> None:
    report = compare_onnx(Net(amplified), in_another_order(tmp_path / "m.onnx", 1.001), ONE, seed)
    assert [(check.passed, check.runs) for check in report.checks] == [(False, LOUDNESSES * (1 + DRAWS))] * 2


def test_the_original_runs_more_often_only_where_the_file_fails(tmp_path: Path) -> None:
    """On the same inputs in float64; and not where the user says what is near enough."""
    path = in_another_order(tmp_path / "m.onnx")
    for seed, runs in ((SOUND, LOUDNESSES), (UNLUCKY[0], LOUDNESSES * (1 + DRAWS))):
        model, given = noted(amplified)
        assert compare_onnx(model, path, ONE, seed).passed
        rounded, exact = ([x for x in given if x.dtype == kind] for kind in (torch.float32, torch.float64))
        assert len(rounded) == len(exact) == runs
        assert all(torch.equal(x.double(), y) for x, y in zip(rounded, exact, strict=True))
    model, given = noted(amplified)
    assert not compare_onnx(model, path, ONE, UNLUCKY[0], tolerance=Tolerance()).passed
    assert runs_in(torch.float32, given) == LOUDNESSES


def test_only_the_output_that_failed_is_measured_again(tmp_path: Path) -> None:
    """The other one's verdict, and the error it is by, stay."""
    total = helper.make_node("ReduceSum", ["x", "one"], ["z"], keepdims=1)
    model = Net(lambda x, w: (amplified(x, w), x.sum(1, keepdim=True)))
    path = in_another_order(tmp_path / "m.onnx", 1.0, total, outputs=("y", "z"))
    report = compare_onnx(model, path, ONE, UNLUCKY[0])
    assert report.passed
    assert [check.runs is None for check in report.checks] == [False, False, True, True]


def test_logits_are_measured_again_too(tmp_path: Path) -> None:
    """Of a sigmoid, which is 1 of numbers this large however they are rounded."""
    sigmoid = helper.make_node("Sigmoid", ["y"], ["p"])
    path = in_another_order(tmp_path / "m.onnx", 1.0, sigmoid, outputs=("p",))
    report = compare_onnx(Net(lambda x, w: amplified(x, w).sigmoid()), path, ONE, UNLUCKY[0])
    assert report.passed, report.lines()
    assert ["(its logits)" in str(c.where) for c in report.checks if c.runs] == [True, True]


# What no more runs are made of, or count.


TWO = {"two": np.float32(2)}
POSITIVE = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))


def doubled(path: Path) -> Path:
    """Of the linear map."""
    return graph(to("Mul", "two"), path, constants=TWO)


def on(model: Net, path: Path, *inputs: Tensor) -> Report:
    """Judged on these inputs of shape (9, 4), each a group of its own."""
    found = [Sample(f"data {i}", (x,), {}) for i, x in enumerate(inputs)]
    return compare_onnx(model, path, [InputSpec("x", (9, 4))], inputs=found)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_whole_numbers_are_not_moved(value: float, tmp_path: Path) -> None:
    model, given = noted(lambda x, w: linear(x, w) + 1)
    report = on(model, doubled(tmp_path / "m.onnx"), torch.full((9, 4), value))
    assert [(check.passed, check.runs) for check in report.checks] == [(False, None)] * 2
    assert runs_in(torch.float32, given) == 1


def test_integers_alone_are_judged_once(tmp_path: Path) -> None:
    model, given = noted(lambda x, w: x.to(w.dtype) / 3)
    nodes = [helper.make_node("Cast", ["x"], ["z"], to=FLOAT), helper.make_node("Div", ["z", "two"], ["y"])]
    path = graph(nodes, tmp_path / "m.onnx", inputs=(("x", TensorProto.INT64, [1, 1000]),), constants=TWO)
    report = compare_onnx(model, path, [InputSpec("x", (1, 1000), "int64")])
    assert [(check.passed, check.runs) for check in report.checks] == [(False, None)] * 2
    assert len(given) == 4  # twice to see what they are looked up in, then once at either precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_that_fail_or_overflow_do_not_count(dtype: torch.dtype, tmp_path: Path) -> None:
    """At this type every second further run is NaN, every fourth raises."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        count = runs_in(dtype, given) if x.dtype == dtype else 1
        if count % 4 == 0:
            raise AssertionError("out of its domain")
        return linear(x, weight) * (torch.nan if count % 2 == 0 else 1)

    model, given = noted(function)
    report = on(model, doubled(tmp_path / "m.onnx"), POSITIVE)
    assert [check.runs for check in report.checks] == [1 + DRAWS // 2] * 2
    assert all(0 < (check.noise_floor or 0) < 1e-6 for check in report.checks)


def test_what_overflowed_at_first_does_not_count_later(tmp_path: Path) -> None:
    """The first of two inputs is run no more: by its own error, had it any then, every file would pass."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        loud = x.dtype == torch.float32 and bool(x.max() <= 0)
        return linear(x, weight) * (
            torch.inf if loud and runs_in(torch.float32, given) == 1 else 1 + 9 * loud
        )

    model, given = noted(function)
    report = on(model, doubled(tmp_path / "m.onnx"), -POSITIVE, POSITIVE)
    assert [(check.passed, check.runs) for check in report.checks] == [(False, 1 + DRAWS)] * 2
    assert runs_in(torch.float32, given) == 2 + DRAWS


# The measure itself.


def test_largest_and_rms_are_over_all_runs() -> None:
    """Errors of 1 and 3 of 8: the largest is 3, the mean square of eight runs of one and one of the other (8·1 + 9)/9."""
    y = torch.full((5,), 8.0, dtype=torch.float64)
    pool = Pool("y")
    pool.add("data", "input", y, y - 1, y + 5)
    assert pool.doubted
    for error in (1, 3, 1, 1, 1, 1, 1, 1):
        pool.add_own("data", y, y + error)
    pool.add_own("data", y, y + torch.inf)
    largest, rms = pool.checks()
    assert (largest.noise_floor, rms.noise_floor) == (3 / 8, pytest.approx((17 / 9) ** 0.5 / 8, rel=1e-12))
    assert (largest.max_rel, rms.max_rel) == (5 / 8, pytest.approx(5 / 8, rel=1e-12))
    assert largest.runs == rms.runs == 9
    assert not pool.doubted
