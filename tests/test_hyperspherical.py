"""The hyperspherical map against 60-digit arithmetic: the vectors, mpmath, and plain loops for long rows."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from oracles import FLOAT32_GRADIENT, FLOAT32_LONG_ROW, FLOAT32_ROUNDED, FLOAT32_ROW, FLOAT64, LONG_ROW
from support import gaussian
from torch import Tensor

from reparam.errors import NonFiniteError
from reparam.kernels.hyperspherical import decode, decode_backward, encode, row_norms
from reparam.parameterizations import PARAMETERIZATIONS, WeightSpec

GMP = PARAMETERIZATIONS["gmp"]
CASES = {case["name"]: case for case in oracles.vectors()}
WITH_GRADIENT = [name for name, case in CASES.items() if "grad_theta_equator" in case]
#: relative to one number: a few roundings
FLOAT64_ULPS = 1e-15

case = pytest.mark.parametrize("name", CASES)


def weight_of(case: dict[str, Any]) -> Tensor:
    return oracles.floats(case["weight_hex"])[None]


def relative(found: Tensor, expected: Tensor) -> float:
    """‖Δ‖/‖expected‖, both vectors."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


@case
def test_vectors_encode_in_float64(name: str) -> None:
    data = CASES[name]
    radius, theta = encode(weight_of(data), torch.float64)
    assert relative(radius, oracles.floats([data["r"]])) <= FLOAT64
    assert relative(theta[0], oracles.floats(data["theta_equator"])) <= FLOAT64
    if data["lambda"] is not None:
        spec = WeightSpec((1, data["n"]), "F64", bias_shape=(1,), bias_dtype="F64", stored="F64")
        tensors = GMP.decompose(weight_of(data), oracles.floats([data["bias_hex"]]), spec)
        assert relative(tensors["lambda_"], oracles.floats([data["lambda"]])) <= FLOAT64


@case
def test_vectors_decode_in_float64(name: str) -> None:
    data, expected = CASES[name], oracles.floats(CASES[name]["u"])
    theta = oracles.floats(data["theta_equator"])[None]
    assert relative(decode(theta, data["n"], torch.float64)[0], expected) <= FLOAT64
    oracles.assert_came_back(decode(theta, data["n"], torch.float64), expected[None], torch.float64)


@case
def test_vectors_from_the_pole_in_float64(name: str) -> None:
    """The paper's colatitudes are read; they are exact enough in float64 only."""
    data = CASES[name]
    spec = WeightSpec((1, data["n"]), "F64", stored="F64", theta_origin="pole")
    tensors = {"r": oracles.floats([data["r"]]), "theta": oracles.floats(data["theta_pole"])[None]}
    weight, bias = GMP.compose(tensors, spec)
    assert bias is None
    oracles.assert_came_back(weight, weight_of(data), torch.float64)


@case
def test_vectors_in_float32(name: str) -> None:
    data = CASES[name]
    weight = weight_of(data).float()
    assert torch.equal(weight.double(), weight_of(data)), "the vectors are float32 numbers"
    radius, theta = encode(weight, torch.float32)
    assert (radius.dtype, theta.dtype) == (torch.float32, torch.float32)
    assert relative(radius, oracles.floats([data["r"]])) <= FLOAT32_ROUNDED
    assert relative(theta[0], oracles.floats(data["theta_equator"])) <= FLOAT32_ROUNDED
    back = decode(theta, data["n"], torch.float32, radius).float()
    bar = FLOAT32_LONG_ROW if data["n"] >= LONG_ROW else FLOAT32_ROW
    oracles.assert_came_back(back, weight, torch.float32, bar)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_vectors_gradients(name: str) -> None:
    data = CASES[name]
    expected, grad = oracles.floats(data["grad_theta_equator"]), oracles.floats(data["grad_u_hex"])[None]
    theta = oracles.floats(data["theta_equator"])[None]
    assert relative(decode_backward(theta, data["n"], torch.float64, grad)[0], expected) <= FLOAT64
    _, theta = encode(weight_of(data).float(), torch.float32)
    found = decode_backward(theta, data["n"], torch.float32, grad.float())
    assert relative(found[0], expected) <= FLOAT32_GRADIENT


# A float32 number, or zero; magnitudes far apart, as pruned and trained rows have them.
NUMBERS = st.one_of(
    st.just(0.0),
    st.just(-0.0),
    st.floats(-4, 4, width=32, allow_subnormal=False),
    st.tuples(st.sampled_from([-1.0, 1.0]), st.integers(-60, 60)).map(lambda p: math.ldexp(*p)),
)
ROWS = st.lists(NUMBERS, min_size=1, max_size=7)


def half_ulp(number: float) -> float:
    """Half the distance of float32 neighbours at ``number``."""
    return math.ldexp(1, max(math.frexp(number)[1], -125) - 25)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(ROWS)
@example([1.0, 1e-9])
@example([0.0, 0.0, -1.0])
@example([-0.0, -1.0])
@example([0.0, 1.0, 0.0, -0.0])
def test_angles_are_those_of_60_digits(row: list[float]) -> None:
    weight = torch.tensor([row], dtype=torch.float64)
    if not weight.any():
        weight[0, 0] = 1
    expected = oracles.exact_angles([x + 0.0 for x in weight[0].tolist()])
    radius, theta = encode(weight, torch.float64)
    norm = mp.sqrt(mp.fsum(mpf(x) ** 2 for x in weight[0].tolist()))
    assert abs(mpf(float(radius)) - norm) <= FLOAT64_ULPS * norm
    _, narrow = encode(weight.float(), torch.float32)
    for t, t32, exact in zip(theta[0].tolist(), narrow[0].tolist(), expected, strict=True):
        assert abs(mpf(t) - exact) <= FLOAT64_ULPS * abs(exact)
        assert abs(mpf(t32) - exact) <= 1.001 * half_ulp(t32)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_values_and_gradients_are_those_of_60_digits(data: st.DataObject, stored: torch.dtype) -> None:
    right, straight = oracles.stored_zeros(stored)
    special = [0.0, right, -right, right / 2]
    free = st.floats(-1.5, 1.5, width=32)
    angles = data.draw(st.lists(st.one_of(free, st.sampled_from(special)), max_size=5))
    angles.append(
        data.draw(st.one_of(st.floats(-3, 3, width=32), st.sampled_from([*special, straight, -straight])))
    )
    n = len(angles) + 1
    grad = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=n, max_size=n))
    theta = torch.tensor([angles], dtype=stored)
    found = decode(theta, n, stored)[0].tolist()
    for u, exact in zip(found, oracles.exact_direction(angles, n, stored), strict=True):
        assert abs(mpf(u) - exact) <= n * FLOAT64_ULPS * abs(exact)
    gradient = decode_backward(theta, n, stored, torch.tensor([grad], dtype=torch.float64))[0].tolist()
    scale = mp.sqrt(mp.fsum(mpf(g) ** 2 for g in grad))
    for g, exact in zip(gradient, oracles.exact_gradient(angles, grad, stored), strict=True):
        assert abs(mpf(g) - exact) <= FLOAT64 * scale


class Decode(torch.autograd.Function):
    """decode with decode_backward as its derivative, for gradcheck."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.n = n
        return decode(theta, n, theta.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return decode_backward(*ctx.saved_tensors, ctx.n, torch.float64, grad[0]), None


KINDS = ["gaussian", "right angles", "steep", "underflow"]


def angles_for(n: int, kind: str) -> Tensor:
    theta = gaussian(3, max(n - 1, 1), seed=n).double()
    if n == 1:
        return theta.sign() * math.pi / 2
    if kind == "right angles":
        theta[:, :: max(1, n // 3)] = math.pi / 2
        theta[0, -1] = math.pi
    elif kind == "steep":  # cosines from 1e-2 to 1e-9, by which a closed form would have to divide
        steps = torch.arange(theta[:, ::5].numel(), dtype=torch.float64).reshape(theta[:, ::5].shape) % 8
        theta[:, ::5] = math.pi / 2 - 10.0 ** (-2 - steps)
    elif kind == "underflow":
        theta[:, :-1] = math.pi / 2 - 1e-12 * (1 + theta[:, :-1].abs())
    return theta


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_gradcheck(n: int, kind: str) -> None:
    theta = angles_for(n, kind).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: Decode.apply(t, n), (theta,), eps=1e-6, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3, 12, 40])
def test_each_gradient_is_right_beside_its_own_prefix(n: int, kind: str) -> None:
    """Component by component: the j-th is bounded by P_j·‖g‖, however small P_j is."""
    theta, grad = angles_for(n, kind), gaussian(3, n, seed=n).double()
    found = decode_backward(theta, n, torch.float64, grad)
    for row in range(len(theta)):
        exact = oracles.exact_gradient(theta[row].tolist(), grad[row].tolist(), torch.float64)
        prefix, scale = mpf(1), mpf(float(grad[row].norm()))
        for j, e in enumerate(exact):
            assert abs(mpf(found[row, j].item()) - e) <= FLOAT64 * prefix * scale + 2.0**-1070
            prefix *= abs(mp.cos(mpf(theta[row, j].item())))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 27, 31, 32, 33, 576, 25_088])
def test_gaussian_rows_in_float32(n: int) -> None:
    weight = gaussian(max(4, 20_000 // n), n, seed=n)
    radius, theta = encode(weight, torch.float32)
    assert (radius.shape, theta.shape) == ((len(weight),), (len(weight), max(n - 1, 1)))
    back = decode(theta, n, torch.float32, radius).float()
    oracles.assert_came_back(back, weight, torch.float32, FLOAT32_LONG_ROW if n >= LONG_ROW else FLOAT32_ROW)
    assert torch.all(theta[:, :-1].abs() <= math.pi / 2 + FLOAT32_ROUNDED)


@pytest.mark.parametrize("n", [100_000, 1_000_000])
def test_very_long_rows(n: int) -> None:
    weight = gaussian(1, n, seed=7)
    for dtype, bar in ((torch.float32, FLOAT32_LONG_ROW), (torch.float64, FLOAT64)):
        radius, theta = encode(weight.to(dtype), dtype)
        back = decode(theta, n, dtype, radius).to(dtype)
        oracles.assert_came_back(back, weight.to(dtype), dtype, bar)


def test_the_gradient_of_a_very_long_row() -> None:
    """Against the recurrence of eq. ∂L/∂t_j = P_j·(cos t_j·g_j − sin t_j·S_{j+1}), one coordinate after the other."""
    n = 1_000_000
    _, theta = encode(gaussian(1, n, seed=8), torch.float64)
    grad = gaussian(1, n, seed=9).double()
    t, g = theta[0].tolist(), grad[0].tolist()
    prefix = [1.0]
    for angle in t[:-1]:
        prefix.append(prefix[-1] * math.cos(angle))
    expected, state = [0.0] * (n - 1), g[-1]
    for j in range(n - 2, -1, -1):
        sine, cosine = math.sin(t[j]), math.cos(t[j])
        expected[j] = prefix[j] * (cosine * g[j] - sine * state)
        state = sine * g[j] + cosine * state
    found = decode_backward(theta, n, torch.float64, grad)[0]
    assert relative(found, torch.tensor(expected, dtype=torch.float64)) <= FLOAT64


@pytest.mark.parametrize("power", [-1000, -600, 600, 1000])
def test_angles_do_not_depend_on_the_scale(power: int) -> None:
    """Squares of float64 weights neither over- nor underflow."""
    weight = gaussian(5, 9, seed=10).double()
    radius, theta = encode(weight, torch.float64)
    scaled_radius, scaled_theta = encode(weight * 2.0**power, torch.float64)
    assert torch.equal(scaled_theta, theta)
    assert torch.equal(scaled_radius, radius * 2.0**power)
    assert torch.equal(row_norms(weight * 2.0**power), row_norms(weight) * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_what_is_not_finite_is_refused(value: float, n: int, dtype: torch.dtype) -> None:
    weight = gaussian(3, n, dtype=dtype)
    weight[1, -1] = value
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    with pytest.raises(NonFiniteError):
        encode(weight, stored)
    with pytest.raises(NonFiniteError):
        row_norms(weight)
    finite = torch.tensor([[3e38, 3e38]])
    with pytest.raises(NonFiniteError, match="float32"):
        encode(finite, torch.float32)
    assert torch.isfinite(encode(finite, torch.float64)[0]).all()


def test_rows_of_zeros_and_empty_matrices() -> None:
    for dtype in (torch.float32, torch.float64):
        radius, theta = encode(torch.tensor([[0.0, -0.0, 0.0]], dtype=dtype), dtype)
        assert radius.tolist() == [0.0]
        assert theta.tolist() == [[0.0, 0.0]]
        assert decode(theta, 3, dtype, radius).tolist() == [[0.0, 0.0, 0.0]]
        radius, theta = encode(torch.empty(0, 5, dtype=dtype), dtype)
        assert (radius.shape, theta.shape) == ((0,), (0, 4))
        assert decode(theta, 5, dtype, radius).shape == (0, 5)
