"""One conformance suite for every kind of layer, element type and parameterization."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layer_kinds import KINDS, Kind, rows_by_loops
from oracles import FLOAT64
from support import gaussian
from torch import Tensor

from reparam.checkpoint.cutting import Block
from reparam.dtypes import code_of
from reparam.errors import NonFiniteError, SelectionError
from reparam.parameterizations import PARAMETERIZATIONS, UnitAxis, WeightSpec, parameterization

SP, WN, GMP = (PARAMETERIZATIONS[name] for name in ("sp", "wn", "gmp"))
#: weight, and g, r, theta, lambda_ beside it
TYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float32 in float64": (torch.float32, torch.float64),
    "float16": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16 in float64": (torch.bfloat16, torch.float64),
}
#: relative, of a bias there and back: λ and the bias are rounded once each, r cancels
BIAS_BAR = {torch.float64: FLOAT64, torch.float32: 2.0**-23, torch.float16: 0.0, torch.bfloat16: 0.0}

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
types = pytest.mark.parametrize(("dtype", "stored"), TYPES.values(), ids=TYPES)

Pair = tuple[Tensor, Tensor | None]


def chain(weight: Tensor, bias: Tensor | None, spec: WeightSpec, names: tuple[str, ...]) -> Pair:
    """Through parameterizations one after the other as files hold them, and to SP at the end."""
    for name in (*names, "sp"):
        map_ = PARAMETERIZATIONS[name]
        tensors = map_.decompose(weight, bias, spec)
        role = next((role for role in ("bias", "lambda_") if role in tensors), None)
        expected = map_.tensors(spec, role)
        assert {r: (code_of(t.dtype), tuple(t.shape)) for r, t in tensors.items()} == expected
        weight, bias = map_.compose(tensors, spec)
    return weight, bias


def assert_layer_came_back(found: Pair, expected: Pair, kind: Kind, stored: torch.dtype) -> None:
    rows, again = (rows_by_loops(w, kind.axis, kind.groups) for w in (expected[0], found[0]))
    oracles.assert_came_back(again, rows, stored)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        assert (found[1].dtype, found[1].shape) == (expected[1].dtype, expected[1].shape)
        bar = 0.0 if stored != expected[0].dtype else BIAS_BAR[expected[1].dtype]
        torch.testing.assert_close(found[1], expected[1], rtol=bar, atol=0)


@types
@kinds
@pytest.mark.parametrize("names", [(), ("wn",), ("gmp",), ("wn", "gmp"), ("gmp", "wn")], ids="→".join)
def test_there_and_back(kind: Kind, dtype: torch.dtype, stored: torch.dtype, names: tuple[str, ...]) -> None:
    weight, bias = kind.tensors(dtype)
    found = chain(weight, bias, kind.spec(dtype, stored), names)
    assert_layer_came_back(found, (weight, bias), kind, stored)


def with_zeros(weight: Tensor, kind: Kind) -> Tensor:
    """80 % zeros of both signs, a row of trailing zeros, one of its last coordinate alone, one of nothing."""
    rows = kind.unit.to_rows(weight).clone()
    generator = torch.Generator().manual_seed(3)
    zero = torch.rand(rows.shape, generator=generator) < 0.8
    rows[zero] = torch.where(torch.rand(rows.shape, generator=generator) < 0.5, 0.0, -0.0)[zero].to(
        rows.dtype
    )
    rows[0, 1:] = -0.0
    if len(rows) > 2:
        rows[1] = 0
        rows[1, -1] = -0.75
        rows[2] = 0
    return kind.unit.from_rows(rows, kind.shape)


@types
@kinds
@pytest.mark.parametrize("names", [("wn",), ("gmp",), ("wn", "gmp")], ids="→".join)
def test_zeros_stay_zeros(
    kind: Kind, dtype: torch.dtype, stored: torch.dtype, names: tuple[str, ...]
) -> None:
    weight = with_zeros(kind.tensors(dtype)[0], kind)
    bias = None if kind.bias is None else torch.zeros(kind.bias, dtype=dtype)
    found, again = chain(weight, bias, kind.spec(dtype, stored), names)
    assert_layer_came_back((found, again), (weight, bias), kind, stored)
    assert torch.equal(found == 0, weight == 0)


def test_zeros_survive_a_theta_that_was_widened() -> None:
    """As by ``.double()``: what counts is the type theta was stored in."""
    weight = with_zeros(KINDS["linear, no bias"].tensors(torch.float32)[0], KINDS["linear, no bias"])
    spec = WeightSpec(tuple(weight.shape), "F32")
    tensors = {role: tensor.double() for role, tensor in GMP.decompose(weight, None, spec).items()}
    again, _ = GMP.compose(tensors, spec)
    oracles.assert_came_back(again.float(), weight, torch.float32)


@kinds
def test_rows_are_units(kind: Kind) -> None:
    """Against loops over every element, and against what the layer computes."""
    weight, bias = kind.tensors(torch.float32)
    rows = kind.unit.to_rows(weight)
    assert torch.equal(rows, rows_by_loops(weight, kind.axis, kind.groups))
    assert rows.shape == (kind.unit.units(kind.shape), kind.unit.fan_in(kind.shape))
    if kind.bias is not None:
        assert rows.shape[0] == math.prod(kind.bias)
    back = kind.unit.from_rows(rows, kind.shape)
    assert torch.equal(back, weight)
    assert back.is_contiguous()
    if kind.module is None:
        return
    module, scale = kind.module().double(), torch.arange(1.0, len(rows) + 1).double()
    x = gaussian(*kind.sample, seed=5).double()
    with torch.no_grad():
        if bias is not None:
            module.bias.zero_()
        module.weight.copy_(weight)
        plain = module(x)
        module.weight.copy_(kind.unit.from_rows(rows.double() * scale[:, None], kind.shape))
        channel = 1 if x.dim() > 2 else -1
        shape = [-1 if axis == channel % x.dim() else 1 for axis in range(x.dim())]
        torch.testing.assert_close(module(x), plain * scale.reshape(shape), rtol=FLOAT64, atol=FLOAT64)


@kinds
def test_blocks_of_a_layer_are_layers(kind: Kind) -> None:
    """Layers are converted in blocks: together they are the whole."""
    weight, bias = kind.tensors(torch.float32)
    spec = kind.spec(torch.float32, torch.float32)
    for map_ in (WN, GMP):
        whole = map_.decompose(weight, bias, spec)
        cut = Block.by_rows if map_ is WN else Block.by_units
        found = {role: torch.full_like(tensor, torch.nan) for role, tensor in whole.items()}
        for block in cut(Block.whole(spec), 12):
            box = tuple(slice(*edge) for edge in block.box)
            b = None if bias is None or block.units is None else bias.reshape(-1)[slice(*block.units)]
            for role, tensor in map_.decompose(weight[box], b, block.of(spec)).items():
                part = block.part(role, tuple(whole[role].shape))
                assert part is not None
                found[role].view(part[0])[tuple(slice(*edge) for edge in part[1])] = tensor
        for role, tensor in whole.items():
            assert torch.equal(found[role], tensor), role


UNUSABLE = {"zero row": (0.0, 1.0), "beyond 2^20": (1.0, 2.0**20 * (1 + 2**-20))}


@pytest.mark.parametrize(("norm", "b"), UNUSABLE.values(), ids=UNUSABLE)
@types
def test_a_layer_without_a_usable_lambda_keeps_its_bias(
    dtype: torch.dtype, stored: torch.dtype, norm: float, b: float
) -> None:
    b = min(b, 6e4) if dtype == torch.float16 else b
    weight = torch.tensor([[0.5, 0.25], [0.0, 0.0]], dtype=dtype)
    weight[1, 0] = norm if dtype != torch.float16 else norm * 2.0**-10
    bias = torch.tensor([1.0, b if b == 1.0 else b * 1.0625], dtype=dtype)
    spec = WeightSpec((2, 2), code_of(dtype), UnitAxis(), (2,), code_of(dtype), code_of(stored))
    assert GMP.bias_role(weight, bias, spec) == "bias"
    tensors = GMP.decompose(weight, bias, spec)
    assert set(tensors) == {"r", "theta", "bias"}
    again, bias_again = GMP.compose(tensors, spec)
    assert torch.equal(bias_again, bias)
    oracles.assert_came_back(again.to(dtype), weight, stored)


def test_the_largest_usable_lambda() -> None:
    spec = WeightSpec((1, 1), "F32", UnitAxis(), (1,), "F32")
    for b, role in ((2.0**20, "lambda_"), (2.0**20 + 0.125, "bias"), (-(2.0**20), "lambda_")):
        assert set(GMP.decompose(torch.ones(1, 1), torch.tensor([b]), spec)) == {"r", "theta", role}


def test_lambda_is_the_bias_divided_by_the_stored_radius() -> None:
    weight, bias = gaussian(50, 7, seed=1), gaussian(50, seed=2)
    tensors = GMP.decompose(weight, bias, WeightSpec((50, 7), "F32", UnitAxis(), (50,), "F32"))
    assert torch.equal(tensors["lambda_"], (bias.double() / tensors["r"].double()).float())
    assert torch.equal(tensors["r"], weight.double().norm(dim=1).float())


def test_a_zero_row_with_a_zero_bias_is_usable() -> None:
    spec = WeightSpec((2, 3), "F32", UnitAxis(), (2,), "F32")
    tensors = GMP.decompose(torch.zeros(2, 3), torch.zeros(2), spec)
    assert {role: t.abs().max().item() for role, t in tensors.items()} == {"r": 0, "theta": 0, "lambda_": 0}


def test_a_single_coordinate_has_a_constant_angle() -> None:
    spec = WeightSpec((3, 1), "F32")
    tensors = GMP.decompose(torch.tensor([[2.5], [-2.5], [0.0]]), None, spec)
    right = torch.tensor(math.pi / 2).item()
    assert tensors["theta"].tolist() == [[right], [-right], [right]]
    assert GMP.compose(tensors, spec)[0].float().tolist() == [[2.5], [-2.5], [0.0]]


def test_a_dead_row_of_weight_norm_is_finite_in_torch() -> None:
    """0·v/‖0‖ is NaN: a dead row keeps g = 0 and gets a direction."""
    tensors = WN.decompose(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), None, WeightSpec((2, 2), "F32"))
    assert tensors["weight_g"].tolist() == [[5.0], [0.0]]
    weight = torch._weight_norm(tensors["weight_v"], tensors["weight_g"], 0)
    assert weight.tolist() == [[3.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["wn", "gmp"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    weight = gaussian(4, 40)
    weight[2, 7] = value
    with pytest.raises(NonFiniteError):
        PARAMETERIZATIONS[name].decompose(weight, None, WeightSpec((4, 40), "F32"))


def test_the_table() -> None:
    assert list(PARAMETERIZATIONS) == ["sp", "wn", "gmp", "unit"]
    assert PARAMETERIZATIONS["unit"].needs_graph
    with pytest.raises(SelectionError, match="unknown parameterization 'polar'"):
        parameterization("polar")


@st.composite
def matrices(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """Up to 4 rows of up to 6 weights: zeros of both signs, ordinary numbers, and magnitudes far apart."""
    n = draw(st.integers(1, 6))
    powers = st.tuples(st.sampled_from([1.0, -1.0, 1.3125]), st.integers(-14, 14)).map(
        lambda p: math.ldexp(*p)
    )
    number = st.one_of(st.sampled_from([0.0, -0.0]), st.floats(-8, 8, width=16), powers)
    rows = draw(st.lists(st.lists(number, min_size=n, max_size=n), min_size=1, max_size=4))
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["wn", "gmp"])
@types
def test_any_matrix_comes_back(dtype: torch.dtype, stored: torch.dtype, name: str) -> None:
    @settings(max_examples=80, derandomize=True, deadline=None)
    @given(matrices(dtype))
    @example(torch.tensor([[1.0, 1e-9]], dtype=torch.float64).to(dtype))
    @example(torch.tensor([[1e-5, -1.0]], dtype=torch.float64).to(dtype))
    @example(torch.tensor([[17536, -1.2734375, -7.82012939453125e-05, -7.159542292356491e-09]]).to(dtype))
    def holds(weight: Tensor) -> None:
        spec = WeightSpec(tuple(weight.shape), code_of(dtype), stored=code_of(stored))
        found, _ = chain(weight, None, spec, (name,))
        oracles.assert_came_back(found, weight, stored)
        if name == "wn" and dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(found, weight), "v is the weight itself, and g has bits to spare"
        lost = (found == 0) & (weight != 0)
        assert not lost.any() or name == "gmp", "only an angle can be too coarse for a weight"

    holds()
