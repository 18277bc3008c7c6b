"""The inputs a file is judged on: sizes, loudness, how many, and data of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deployment_cases import ROWS, Net, graph, linear, names, to
from onnx import TensorProto, helper
from torch import Tensor, nn

from reparam.errors import DataError
from reparam.graph import InputSpec, parse_spec
from reparam.verification import compare_onnx, load_data
from reparam.verification.own_error import DRAWS, _moved
from reparam.verification.samples import Sample, samples


class Looks(nn.Module):
    """Two tables, ids into one, positions into the other."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(37, 3), nn.Embedding(70, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.places(torch.arange(ids.shape[1]))


def test_integers_stay_within_the_table_they_are_looked_up_in() -> None:
    """And sizes that the model refuses, T = 96, are left out and named."""
    found = list(samples(Looks(), [parse_spec("ids=int64[N,T]")], 0))
    inputs = [sample.inputs[0] for sample in found if isinstance(sample, Sample)]
    largest = max(int(x.max()) for x in inputs)
    assert 30 <= largest < 37
    assert {x.shape[0] for x in inputs} == {1, 2, 3}
    assert len({x.shape[1] for x in inputs}) >= 2
    assert any("T=96" in note for note in found if isinstance(note, str))


def test_samples_cover_sizes_and_loudness() -> None:
    specs = [parse_spec("a=float32[N,T,U]"), parse_spec("m=bool[N,T]"), parse_spec("h=float16[3]")]
    model = Net(lambda x, w: x)
    model.forward = lambda a, m, h: a  # type: ignore[method-assign]
    drawn = [sample for sample in samples(model, specs, 0, spare=True) if isinstance(sample, Sample)]
    found, spare = drawn[:3], drawn[3:]
    assert len([s for s in samples(model, specs, 0) if isinstance(s, Sample)]) == 3
    for three in (found, spare):
        assert [sample.group for sample in three] == ["scale 0.1", "scale 1", "scale 10"]
    assert [sample.spare for sample in drawn] == [False] * 3 + [True] * 3
    assert [sample.sizes["N"] for sample in drawn] == [1, 2, 3, 8, 9, 7]
    assert all(a.sizes["T"] != b.sizes["T"] for a, b in zip(found, spare, strict=True))
    assert [x.dtype for x in found[0].inputs] == [torch.float32, torch.bool, torch.float16]
    for sample in drawn:
        assert sample.sizes["T"] != sample.sizes["U"]
        assert sample.inputs[0].shape[:2] == sample.inputs[1].shape
    assert all(len({sample.sizes[axis] for sample in found}) == 3 for axis in "NTU")


def test_what_is_exact_is_of_the_inputs_as_the_file_takes_them() -> None:
    """Rounded to its types they are other inputs."""
    model = Net(linear)
    model.forward = lambda x, ids: x / 3  # type: ignore[method-assign]
    sample = Sample("data", (torch.tensor([0.1]), torch.tensor([7])), {}).tried(model)
    assert isinstance(sample, Sample)
    assert sample.cast([torch.float32, torch.int64]) is sample.cast([None, None]) is sample
    cast = sample.cast([torch.float16, torch.float16])
    assert [x.dtype for x in cast.inputs] == [torch.float16, torch.int64]
    assert sample.run_exactly(model).outputs[0].item() == np.float64(np.float32(0.1)) / 3
    assert cast.run_exactly(model).outputs[0].item() == np.float64(np.float16(0.1)) / 3


@pytest.mark.parametrize(
    ("values", "rows"), [(1000, [1, 2, 3]), (500, [1, 2, 3, 8]), (333, [1, 2, 3, 7, 8, 9])]
)
def test_few_values_need_more_samples(values: int, rows: list[int], tmp_path: Path) -> None:
    """1000 of every loudness are enough. The original runs twice for each: in float64 and as it is deployed."""
    given: list[tuple[torch.dtype, int]] = []

    def wide(x: Tensor, weight: Tensor) -> Tensor:
        given.append((x.dtype, len(x)))
        return x.sum(1, keepdim=True) * torch.ones(values)

    nodes = [
        helper.make_node("ReduceSum", ["x", "one"], ["s"]),
        helper.make_node("Mul", ["s", "ones"], ["y"]),
    ]
    constants = {"one": np.array([1]), "ones": np.ones((1, values), np.float32)}
    report = compare_onnx(Net(wide), graph(nodes, tmp_path / "m.onnx", constants=constants), ROWS)
    assert report.passed, report.lines()
    for dtype in (torch.float64, torch.float32):
        assert sorted(n for kind, n in given if kind == dtype) == rows
    assert len(given) == 2 * len(rows)


def test_an_axis_that_only_one_size_fits_is_not_dynamic(tmp_path: Path) -> None:
    model = Net(lambda x, w: linear(x, w) + x.new_zeros(1, 3).expand(2, 3))
    report = compare_onnx(model, graph(to("Identity"), tmp_path / "m.onnx"), ROWS)
    assert not report.passed
    model = Net(lambda x, w: linear(x.reshape(2, 4), w))
    report = compare_onnx(model, graph(to("Identity"), tmp_path / "m.onnx"), ROWS)
    assert names(report) == ["dynamic axes"]
    assert "N=2 alone" in str(report.checks[0].where)


def test_real_data_is_judged_too(tmp_path: Path) -> None:
    """A fault that shows on real inputs alone: the file is right but for inputs beyond 1000."""
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["c"]),
        helper.make_node("MatMul", ["c", "weight"], ["y"]),
    ]
    path = graph(nodes, tmp_path / "m.onnx", constants={"low": np.float32(-1000), "high": np.float32(1000)})
    np.savez(tmp_path / "d.npz", x=np.full((5, 4), 2000, np.float32))
    assert compare_onnx(Net(linear), path, ROWS).passed
    data = load_data(tmp_path / "d.npz", ROWS)
    report = compare_onnx(Net(linear), path, ROWS, data=data)
    assert "at data" in str(report.failures[0].where)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((5, 3), np.float32), r"`x` is torch.float32 \[5, 3\], --input says float32 N,4"),
        (np.zeros((5, 4), np.int64), "torch.int64"),
        (np.full((5, 4), np.nan, np.float32), "NaN or Inf"),
    ],
)
def test_data_that_does_not_fit_is_refused(value: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", value)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "d.npy", ROWS)


def test_data_without_the_input_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(DataError, match="no input `x`"):
        load_data(tmp_path / "d.npz", ROWS)


# Next to them the original's own error is measured once more.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_inputs_move_to_a_neighbour_or_stay(dtype: torch.dtype) -> None:
    """By half an ulp of 1, relative: less than a step of their type before they are rounded to it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(2000, generator=generator), torch.tensor([0.0, -0.0, 1, -3, 1e5])]).to(dtype)
    moved = _moved(x, torch.finfo(dtype).eps / 2, generator)
    assert moved.dtype == dtype
    steps = (moved.double() - x.double()) / (x.double() * torch.finfo(dtype).eps)
    assert torch.equal(moved[2000:], x[2000:])
    assert bool((steps[:2000].abs() <= 1).all())
    assert 0.2 < float((moved != x).double().mean()) < 0.5
    assert 0.4 < float((steps[:2000] > 0).sum() / (steps[:2000] != 0).sum()) < 0.6
    assert _moved(torch.arange(3), 0.5, generator).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, TensorProto.FLOAT16), (torch.bfloat16, TensorProto.BFLOAT16)]
)
def test_inputs_move_by_the_deployed_type(dtype: torch.dtype, kind: int, tmp_path: Path) -> None:
    """The inputs themselves are of that type, and so is what the original is given."""
    given: list[Tensor] = []

    def same(x: Tensor, weight: Tensor) -> Tensor:
        given.append(x)
        return x @ torch.eye(4).to(x.dtype)

    narrow = np.eye(4, dtype=helper.tensor_dtype_to_np_dtype(kind)) * 2
    nodes = [helper.make_node("MatMul", ["x", "narrow"], ["y"])]
    path = graph(nodes, tmp_path / "m.onnx", [("y", kind)], [("x", kind, ["N", 4])], {"narrow": narrow})
    positive = Sample("data", (torch.rand(9, 4, generator=torch.Generator().manual_seed(0)),), {})
    assert not compare_onnx(Net(same), path, [InputSpec("x", (9, 4))], inputs=[positive]).passed
    first, *more = (x for x in given if x.dtype == dtype)
    assert len(more) == DRAWS
    moved = torch.stack([x.double() - first.double() for x in more]).abs() / first.double()
    step = torch.finfo(dtype).eps
    assert step / 2 <= float(moved.max()) <= step
