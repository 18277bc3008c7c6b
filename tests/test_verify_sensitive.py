"""An output that follows its input in steps, or steeply: that is no error of the original's, and excuses no file.

Each of these wrong files passed by f(x') − y(x), with x' half an ulp beside x.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployment_cases import ROWS, WEIGHT, Net, graph, linear
from onnx import TensorProto, helper
from torch import Tensor

from reparam.graph import InputSpec
from reparam.verification import Report, compare_onnx
from reparam.verification.samples import Sample

FLOAT = TensorProto.FLOAT
#: in steps of a tenth, and the first of every row on the threshold
HERE = 0.3
GRID = torch.randint(-20, 21, (9, 4), generator=torch.Generator().manual_seed(5)) / 10
GRID[:, 0] = HERE


def stepped(loud: float, x: Tensor, weight: Tensor) -> Tensor:
    """The linear map, and 1 more from the threshold on; ``loud`` times all of it below."""
    there = (x[:, :1] >= HERE).to(x.dtype)
    return (linear(x, weight) + there) * (there + loud * (1 - there))


def in_steps(path: Path, gain: float, loud: float, *more: onnx.NodeProto) -> Path:
    """The same with other weights, and ``more`` nodes behind."""
    made = helper.make_node
    nodes = [made("MatMul", ["x", "weight"], ["z"]), made("Gather", ["x", "first"], ["c"], axis=1),
             made("GreaterOrEqual", ["c", "here"], ["is"]), made("Cast", ["is"], ["there"], to=FLOAT),
             made("Add", ["z", "there"], ["w"]), made("Where", ["is", "one", "loud"], ["by"]),
             made("Mul", ["w", "by"], ["y"]), *more]  # fmt: skip
    constants = {"weight": WEIGHT.numpy().T * np.float32(gain), "first": np.array([0]),
                 "here": np.float32(HERE), "one": np.float32(1), "loud": np.float32(loud)}  # fmt: skip
    return graph(nodes, path, [(nodes[-1].output[0], FLOAT)], constants=constants)


def on(model: Net, path: Path, x: Tensor) -> Report:
    """Judged on this input of shape (9, 4) alone."""
    return compare_onnx(model, path, [InputSpec("x", (9, 4))], inputs=[Sample("data", (x,), {})])


@pytest.mark.parametrize(("gain", "right"), [(1, True), (1.0001, False), (1.01, False), (1.1, False)])
def test_a_step_excuses_no_other_weights(gain: float, right: bool, tmp_path: Path) -> None:
    """Moved off the threshold the output is another by 1. The noise beside the data is not excused by it either."""
    report = compare_onnx(
        Net(partial(stepped, 1)), in_steps(tmp_path / "m.onnx", gain, 1), ROWS, data=[(GRID,)]
    )
    assert [check.passed for check in report.checks] == [right] * 2


def test_a_step_excuses_no_other_logits(tmp_path: Path) -> None:
    path = in_steps(tmp_path / "m.onnx", 1.001, 1, helper.make_node("Sigmoid", ["y"], ["p"]))
    report = compare_onnx(Net(lambda x, w: stepped(1, x, w).sigmoid()), path, ROWS, data=[(GRID,)])
    assert [check.passed for check in report.checks if "(its logits)" in str(check.where)] == [False] * 2


@pytest.mark.parametrize(("gain", "right"), [(1, True), (1.0001, False)])
def test_errors_beside_a_step_are_shares_of_the_output_there(
    gain: float, right: bool, tmp_path: Path
) -> None:
    """A thousand times as loud, rounded as well as here."""
    report = on(Net(partial(stepped, 1000)), in_steps(tmp_path / "m.onnx", gain, 1000), GRID)
    assert [check.passed for check in report.checks] == [right] * 2


@pytest.mark.parametrize(("by", "right"), [(0, True), (1e-4, False)])
def test_a_difference_of_large_inputs_excuses_no_other_weight(by: float, right: bool, tmp_path: Path) -> None:
    """It is exact; half an ulp of what it is taken of is a ten-thousandth of it."""
    mean = torch.tensor(293.15)
    x = mean + torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) / 10
    weight = WEIGHT.numpy().T.copy()
    weight[1, 1] *= 1 + by
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["d"]),
        helper.make_node("MatMul", ["d", "weight"], ["y"]),
    ]
    path = graph(nodes, tmp_path / "m.onnx", constants={"weight": weight, "mean": mean.numpy()})
    report = on(Net(lambda x, w: linear(x - mean.to(x.dtype), w)), path, x)
    assert [check.passed for check in report.checks] == [right] * 2
