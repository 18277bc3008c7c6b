"""The map's operator: registered as torch wants it, and right against 60-digit arithmetic."""

from __future__ import annotations

import json
import math

import pytest
import torch
from mpmath import mp, mpf
from support import SHARED, gaussian
from torch import Tensor

from reparam.kernels.gradient import rows_gradient
from reparam.kernels.hyperspherical import decode, decode_backward, encode
from reparam.kernels.operator import compose_rows

EXACT = 1e-12
FLOAT32_ROW = 1e-6

F32, F64 = torch.float32, torch.float64

_FILE = SHARED / "vectors" / "gmp_vectors.json"
VECTORS = json.loads(_FILE.read_text())["cases"] if _FILE.is_file() else []


def numbers(texts: list[str]) -> Tensor:
    return torch.tensor([float(text) for text in texts], dtype=F64)[None]


def from_hex(texts: list[str]) -> Tensor:
    return torch.tensor([float.fromhex(text) for text in texts], dtype=F64)[None]


def angles(*shape: int, seed: int = 0, reach: float = math.pi) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1) * reach


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
@pytest.mark.parametrize("radius", [True, False])
def test_is_registered_as_torch_wants_it(n: int, dtype: torch.dtype, radius: bool) -> None:
    theta = angles(3, max(n - 1, 1)).to(F64 if dtype == F64 else F32).requires_grad_()
    r = gaussian(3, dtype=theta.dtype).requires_grad_() if radius else None
    rows = torch.ops.reparam.rows.default
    found = torch.library.opcheck(rows, (r, theta, n, theta.dtype, dtype))
    assert set(found.values()) == {"SUCCESS"}
    detached = None if r is None else r.detach()
    gradient = torch.ops.reparam.rows_gradient.default
    grad = gaussian(3, n, dtype=dtype)
    found = torch.library.opcheck(gradient, (detached, theta.detach(), n, theta.dtype, grad))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.skipif(not VECTORS, reason=f"no {_FILE}: set REPARAM_SHARED")
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_values_and_gradients_of_the_vectors(case: dict[str, object]) -> None:
    n, grad, u = case["n"], from_hex(case["grad_u_hex"]), numbers(case["u"])
    # The exact angles rounded to float64: the map's condition is that of a rotation, one.
    theta = numbers(case["theta_equator"]).requires_grad_()
    r = numbers([case["r"]])[0].requires_grad_()
    rows = compose_rows(None, theta, n, F64, F64)
    assert float((rows.detach() - u).norm()) <= EXACT
    weight = compose_rows(r, theta, n, F64, F64)
    assert float(((weight - from_hex(case["weight_hex"])).norm() / r).detach()) <= EXACT
    d_r, d_theta = torch.autograd.grad(weight, (r, theta), grad)
    assert float(abs(d_r - (u * grad).sum())) <= EXACT * float(grad.norm())
    if "grad_theta_equator" in case:
        expected = numbers(case["grad_theta_equator"]) * r.detach()
        assert float((d_theta - expected).norm()) <= EXACT * float(grad.norm() * r.detach())
    if n == 1:
        assert not d_theta.any()


@pytest.mark.skipif(not VECTORS, reason=f"no {_FILE}: set REPARAM_SHARED")
@pytest.mark.parametrize(
    "case", [c for c in VECTORS if "grad_theta_equator" not in c and c["n"] > 1], ids=lambda c: c["name"]
)
def test_gradients_of_long_vectors_against_as_many_digits(case: dict[str, object]) -> None:
    mp.dps = 40
    t = [mpf(text) for text in case["theta_equator"]]
    g = [mpf(float.fromhex(text)) for text in case["grad_u_hex"]]
    state, expected, prefix = g[-1], [mpf(0)] * len(t), [mpf(1)]
    for angle in t:
        prefix.append(prefix[-1] * mp.cos(angle))
    for j in range(len(t) - 1, -1, -1):
        expected[j] = prefix[j] * (mp.cos(t[j]) * g[j] - mp.sin(t[j]) * state)
        state = mp.sin(t[j]) * g[j] + mp.cos(t[j]) * state
    theta = numbers(case["theta_equator"]).requires_grad_()
    grad = from_hex(case["grad_u_hex"])
    (found,) = torch.autograd.grad(compose_rows(None, theta, case["n"], F64, F64), theta, grad)
    exact = torch.tensor([float(value) for value in expected], dtype=F64)
    assert float((found[0] - exact).norm() / exact.norm()) <= EXACT


@pytest.mark.parametrize("n", [2, 27, 4608, 25088])
def test_float32_rows(n: int) -> None:
    weight = gaussian(4, n)
    r, theta = encode(weight, F32)
    rows = compose_rows(r, theta, n, F32, F32)
    error = (rows.double() - weight.double()).norm(dim=1) / weight.double().norm(dim=1)
    assert float(error.max()) <= FLOAT32_ROW


@pytest.mark.parametrize("radius", [True, False])
def test_gradcheck_where_cosines_are_small_zero_and_negative(radius: bool) -> None:
    theta = angles(6, 5)
    theta[0, 2] = 1e-4 + math.pi / 2
    theta[1, 0] = math.pi / 2 - 1e-8
    theta[2, 3:] = 3.0
    theta[3, :4] = 1.5
    r = gaussian(6, dtype=F64, seed=3)
    r[4] = 0
    leaves = [t.requires_grad_() for t in ((r, theta) if radius else (theta,))]

    def forward(*values: Tensor) -> Tensor:
        return compose_rows(values[0] if radius else None, values[-1], 6, F64, F64)

    assert torch.autograd.gradcheck(forward, leaves, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reach", [0.05, 1.0, math.pi])
def test_the_closed_form_agrees_with_the_recurrence(reach: float) -> None:
    theta, grad, r = angles(64, 99, reach=reach), gaussian(64, 100, dtype=F64), gaussian(64, dtype=F64)
    theta[5, 7] = math.pi / 2
    d_r, d_theta = rows_gradient(r, theta, 100, F64, grad)
    expected = decode_backward(theta, 100, F64, grad * r[:, None])
    assert float((d_theta - expected).norm(dim=1).max()) <= EXACT * float(expected.norm(dim=1).max())
    torch.testing.assert_close(d_r, (decode(theta, 100, F64) * grad).sum(1), rtol=EXACT, atol=EXACT)
    assert not d_theta[5, 8:].any()


def test_exact_zeros_are_those_of_the_stored_dtype() -> None:
    weight = gaussian(64, 27) * (gaussian(64, 27, seed=5) > 0.8)
    r, theta = encode(weight, F32)
    for dtype in (F32, F64, torch.float16):
        assert torch.equal(compose_rows(r, theta, 27, F32, dtype) == 0, weight.to(dtype) == 0)
    wide = compose_rows(r.double(), theta.double(), 27, F32, F64)
    assert torch.equal(wide == 0, weight == 0)
    assert not torch.equal(compose_rows(r.double(), theta.double(), 27, F64, F64) == 0, weight == 0)


def test_half_precision_rows_are_rounded_once() -> None:
    r, theta = encode(gaussian(8, 40), F32)
    exact = decode(theta, 40, F32, r)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(compose_rows(r, theta, 40, F32, dtype), exact.to(dtype))


def test_nothing_but_its_arguments_is_kept_for_the_backward_pass() -> None:
    r, theta = (t.requires_grad_() for t in encode(gaussian(8, 40), F32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compose_rows(r, theta, 40, F32, F32)
    assert {t.data_ptr() for t in kept} == {r.data_ptr(), theta.data_ptr()}
    assert len(kept) == 2


def test_narrow_angles_are_refused() -> None:
    r, theta = encode(gaussian(2, 4), F32)
    with pytest.raises(ValueError, match=r"theta is torch\.bfloat16.*mixed precision"):
        compose_rows(r, theta.bfloat16(), 4, F32, F32)


def test_only_once_differentiable() -> None:
    theta = angles(2, 3).requires_grad_()
    rows = compose_rows(None, theta, 4, F64, F64)
    (first,) = torch.autograd.grad(rows.square().sum() + rows.sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="rows_gradient"):
        first.sum().backward()


def test_no_rows() -> None:
    theta = torch.zeros(0, 3, requires_grad=True)
    rows = compose_rows(torch.zeros(0), theta, 4, F32, F32)
    assert rows.shape == (0, 4)
    rows.sum().backward()
    assert theta.grad.shape == (0, 3)


def test_the_bench_reports_every_shape_and_job() -> None:
    from reparam.bench.kernel import JOBS, bench_kernel

    value = bench_kernel(1, lambda what: None, max_elements=2000)
    assert json.loads(json.dumps(value))["what"] == "kernel"
    assert [(tuple(r["shape"]), r["name"]) for r in value["results"]] == [
        (shape, job) for shape in ((64, 27), (100, 1)) for job in JOBS
    ]
    assert all(r["to_weight_norm"] > 0 for r in value["results"])
