"""The map in compiled loops on a CPU: as right as the reference, whatever the shape, and gone without a word where numba is."""

from __future__ import annotations

import math
import multiprocessing
import sys
import threading

import oracles
import pytest
import torch
from mpmath import mp, mpf
from support import gaussian, python
from torch import Tensor

from reparam.kernels import backend, hyperspherical
from reparam.kernels.gradient import rows_gradient

pytest.importorskip("numba", reason="pip install reparam[fast]")
compiled = pytest.importorskip("reparam.kernels.compiled")
loops = pytest.importorskip("reparam.kernels.compiled_loops")

F32, F64 = torch.float32, torch.float64
EXACT = oracles.FLOAT64
#: half an ulp of float32, and of a result one ulp of float64 beside the reference's
ONCE = 2.0**-24 * (1 + 1e-6)
BLOCK, LANES = loops.BLOCK, loops.LANES


def angles(rows: int, n: int, reach: float = math.pi, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    drawn = torch.rand(rows, max(n - 1, 1), generator=torch.Generator().manual_seed(seed + n), dtype=F64)
    return ((2 * drawn - 1) * reach).to(dtype)


def typical(rows: int, n: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Radii and angles of Gaussian rows."""
    return hyperspherical.encode(gaussian(rows, n, seed=n).to(dtype), dtype)


@pytest.mark.skipif(not oracles.vectors(), reason="no vectors: set REPARAM_SHARED")
@pytest.mark.parametrize("case", oracles.vectors(), ids=lambda case: case["name"])
def test_values_and_gradients_of_the_vectors(case: dict[str, object]) -> None:
    n, grad = case["n"], oracles.floats(case["grad_u_hex"])[None]
    theta, r = oracles.floats(case["theta_equator"])[None], oracles.floats([case["r"]])
    unit = compiled.decode(theta, n, F64)
    assert float((unit[0] - oracles.floats(case["u"])).norm()) <= EXACT
    rows = compiled.decode(theta, n, F64, r)
    assert float((rows[0] - oracles.floats(case["weight_hex"])).norm() / r) <= EXACT
    d_r, d_theta = compiled.rows_gradient(r, theta, n, F64, grad)
    assert float(abs(d_r - (oracles.floats(case["u"]) * grad).sum())) <= EXACT * float(grad.norm())
    if "grad_theta_equator" in case:
        expected = oracles.floats(case["grad_theta_equator"]) * r
        assert float((d_theta[0] - expected).norm()) <= EXACT * float(grad.norm() * r)


SHAPES = [1, 2, 3, 5, 31, 127, 129, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1, 1021, 4096]


@pytest.mark.parametrize("n", SHAPES)
@pytest.mark.parametrize("reach", [0.3, math.pi])
def test_agrees_with_the_reference(n: int, reach: float) -> None:
    """Every number of rows up to two full groups of lanes; angles that are small, and that are not."""
    for rows in range(2 * LANES + 1):
        theta, r, grad = angles(rows, n, reach), gaussian(rows, seed=2).double(), gaussian(rows, n).double()
        expected = hyperspherical.decode(theta, n, F64, r)
        found = compiled.decode(theta, n, F64, r)
        assert float((found - expected).norm()) <= EXACT * float(r.norm())
        d_r, d_theta = compiled.rows_gradient(r, theta, n, F64, grad)
        e_r, e_theta = rows_gradient(r, theta, n, F64, grad)
        assert float((d_r - e_r).norm()) <= EXACT * float(grad.norm())
        assert float((d_theta - e_theta).norm()) <= EXACT * float(grad.norm() * r.norm())


def test_a_very_long_row() -> None:
    n = 1_000_000
    r, theta = typical(1, n)
    grad = gaussian(1, n, seed=9).double()
    expected = hyperspherical.decode(theta, n, F64, r)
    assert float((compiled.decode(theta, n, F64, r) - expected).norm()) <= EXACT * float(r)
    _, e_theta = rows_gradient(None, theta, n, F64, grad)
    _, d_theta = compiled.rows_gradient(None, theta, n, F64, grad)
    assert float((d_theta - e_theta).norm() / e_theta.norm()) <= EXACT


@pytest.mark.parametrize("n", [2, 27, 576, 4096])
def test_float32_results_are_rounded_once(n: int) -> None:
    """Each is the nearest float32 of float64's, or that of a float64 one ulp beside it."""
    r, theta = typical(7, n, F32)
    exact = hyperspherical.decode(theta, n, F32, r)
    rows = compiled.decode(theta, n, F32, r, F32)
    assert rows.dtype == F32
    assert bool(((rows.double() - exact).abs() <= ONCE * exact.abs()).all())
    for narrow in (torch.bfloat16, torch.float16):
        assert torch.equal(compiled.decode(theta, n, F32, r, narrow), rows.to(narrow))
    grad = gaussian(7, n, seed=1)
    e_r, e_theta = rows_gradient(r.double(), theta.double(), n, F32, grad.double())
    d_r, d_theta = compiled.rows_gradient(r, theta, n, F32, grad)
    assert (d_r.dtype, d_theta.dtype) == (F32, F32)
    slack = EXACT * float(grad.norm() * r.max())
    assert bool(((d_theta.double() - e_theta).abs() <= ONCE * e_theta.abs() + slack).all())
    assert bool(((d_r.double() - e_r).abs() <= ONCE * e_r.abs() + slack).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_gradient_is_widened(dtype: torch.dtype) -> None:
    r, theta = typical(5, 40, F32)
    grad = gaussian(5, 40, dtype=dtype)
    for found, expected in zip(
        compiled.rows_gradient(r, theta, 40, F32, grad),
        compiled.rows_gradient(r, theta, 40, F32, grad.float()),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["right angles", "steep", "underflow"])
@pytest.mark.parametrize("n", [2, 3, 12, 30])
def test_each_gradient_is_right_beside_its_own_prefix(n: int, kind: str) -> None:
    """Component by component: the j-th is bounded by P_j·‖g‖, however small P_j is."""
    theta, grad = angles(5, n), gaussian(5, n, seed=n).double()
    if kind == "right angles":
        theta[:, :: max(1, n // 3)] = math.pi / 2
        theta[0, -1] = math.pi
    elif kind == "steep":
        theta[:, ::5] = math.pi / 2 - 10.0 ** (-2 - torch.arange(theta[0, ::5].numel(), dtype=F64))
    else:
        theta[:, :-1] = math.pi / 2 - 1e-12 * (1 + theta[:, :-1].abs())
    _, found = compiled.rows_gradient(None, theta, n, F64, grad)
    for row in range(len(theta)):
        exact = oracles.exact_gradient(theta[row].tolist(), grad[row].tolist(), F64)
        prefix, scale = mpf(1), mpf(float(grad[row].norm()))
        for j, e in enumerate(exact):
            assert abs(mpf(found[row, j].item()) - e) <= EXACT * prefix * scale + 2.0**-1070
            prefix *= abs(mp.cos(mpf(theta[row, j].item())))


def test_angles_of_any_size() -> None:
    """Multiples of a quarter turn and what lies just beside, up to where reducing them takes the library's own function."""
    sizes = [k * math.pi / 4 + d for k in range(9) for d in (-1e-9, 0.0, 1e-300, 1e-9)]
    sizes += [0.7, 1.0, 1.2, 1.5, 1e3, 123456.789, 636619 * math.pi / 2, 999999.5, 1e6, 1e6 + 1, 1e15, 1e300]
    theta = torch.tensor([[s * size] for size in sizes for s in (1.0, -1.0)], dtype=F64)
    rows = compiled.decode(theta, 2, F32)  # stored as float32: only that π/2 has cosine zero
    for (t,), (sine, cosine) in zip(theta.tolist(), rows.tolist(), strict=True):
        for found, exact in ((sine, mp.sin(mpf(t))), (cosine, mp.cos(mpf(t)))):
            assert abs(mpf(found) - exact) <= EXACT * abs(exact), t


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_row_only(value: float) -> None:
    theta, n = angles(6, 40), 40
    theta[2, 20], theta[3, 5] = value, math.pi / 2
    rows = compiled.decode(theta, n, F64)
    spoiled = rows.isnan().any(dim=1).tolist()
    assert spoiled == [False, False, True, False, False, False]
    assert rows[2, :20].isfinite().all()
    assert rows[2, 20:].isnan().all()
    assert not rows[3, 6:].any()


@pytest.mark.parametrize("n", [3, 27, 600])
def test_exact_zeros_are_those_of_the_stored_dtype(n: int) -> None:
    weight = gaussian(64, n) * (gaussian(64, n, seed=5) > 0.5)
    weight[0, -1] = -0.0
    r, theta = hyperspherical.encode(weight, F32)
    assert torch.equal(compiled.decode(theta, n, F32, r, F32) == 0, weight == 0)
    assert torch.equal(compiled.decode(theta, n, F32, r, F64) == 0, weight == 0)
    assert torch.equal(compiled.decode(theta.double(), n, F32, r.double()) == 0, weight == 0)
    assert not torch.equal(compiled.decode(theta.double(), n, F64, r.double()) == 0, weight == 0)


@pytest.mark.parametrize("beside", [0.5, 1e9])
@pytest.mark.parametrize("at", [0, 3, 298, 299])
def test_a_right_angle_beside_any_other(beside: float, at: int) -> None:
    """Also in a block that holds an angle which only the library's functions reduce."""
    theta, grad = torch.full((1, 300), beside), gaussian(1, 301)
    theta[0, at] = -math.pi / 2
    assert not compiled.decode(theta, 301, F32)[0, at + 1 :].any()
    _, d_theta = compiled.rows_gradient(None, theta, 301, F32, grad)
    assert d_theta[0, : at + 1].all()
    assert not d_theta[0, at + 1 :].any()


def test_every_number_of_the_result_is_written() -> None:
    """torch fills what is asked for uninitialized with NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for rows, n in ((1, 1), (5, 1), (3, 2), (9, BLOCK + 1), (4, 2 * BLOCK)):
            theta, grad = angles(rows, n), gaussian(rows, n).double()
            assert compiled.decode(theta, n, F64).isfinite().all()
            for found in compiled.rows_gradient(None, theta, n, F64, grad):
                assert found.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_coordinate_has_no_angle_to_train() -> None:
    theta, r, grad = angles(5, 1), gaussian(5).double(), gaussian(5, 1, seed=4).double()
    d_r, d_theta = compiled.rows_gradient(r, theta, 1, F64, grad)
    assert not d_theta.any()
    torch.testing.assert_close(d_r, (theta.sin() * grad)[:, 0], rtol=EXACT, atol=0)


def test_memory_layouts() -> None:
    theta, grad = angles(6, 41), gaussian(6, 41).double()
    expected = compiled.decode(theta, 41, F64), *compiled.rows_gradient(None, theta, 41, F64, grad)
    wide = torch.zeros(12, 80, dtype=F64)
    wide[::2, ::2] = theta
    for other in (theta.t().contiguous().t(), wide[::2, ::2], theta.clone().requires_grad_()):
        found = (
            compiled.decode(other, 41, F64),
            *compiled.rows_gradient(None, other, 41, F64, grad.t().contiguous().t()),
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _mapped(theta: Tensor, grad: Tensor) -> list[Tensor]:
    n = grad.shape[1]
    return [compiled.decode(theta, n, F32, None, F32), *compiled.rows_gradient(None, theta, n, F32, grad)]


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "_SHARE", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 3, 4, 13, 50])
def test_rows_are_the_same_in_any_company(rows: int, threaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, among others, and cut up among threads, none of which stays."""
    theta, grad = angles(rows, 300, 0.5, F32), gaussian(rows, 300)
    theta[:, -40:] *= 6
    started, others = list[object](), threading.active_count()
    pool = compiled.ThreadPoolExecutor
    monkeypatch.setattr(compiled, "ThreadPoolExecutor", lambda count: started.append(count) or pool(count))
    found = _mapped(theta, grad)
    assert started == [min(3, rows // LANES) - 1] * 2 if rows >= 2 * LANES else not started
    assert threading.active_count() == others
    alone = [_mapped(theta[i : i + 1], grad[i : i + 1]) for i in range(rows)]
    for whole, parts in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_in_a_forked_process(threaded: None) -> None:
    theta, grad = angles(13, 300, 0.5, F32), gaussian(13, 300)
    expected = _mapped(theta, grad)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_mapped, (theta, grad)).get(timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_is_what_runs_on_a_cpu() -> None:
    for dtype in (F32, F64):
        theta = angles(3, 4, dtype=dtype)
        assert backend.name(theta) == "compiled"
        assert backend.choose(theta).decode is compiled.decode
        assert backend.choose(theta).gradient is compiled.rows_gradient
    assert backend.name(angles(3, 4).half()) == "reference (compiled: angles in torch.float16)"


WITHOUT = """
import sys
sys.modules["numba"] = None
import torch
from reparam.kernels.backend import name
from reparam.kernels.operator import compose_rows
theta = torch.tensor([[0.5]], dtype=torch.float64)
print(compose_rows(None, theta, 2, torch.float64, torch.float64).tolist(), name(theta))
"""


def test_without_numba_the_reference_runs_and_says_so() -> None:
    ran = python(WITHOUT)
    assert ran.stderr == ""
    assert ran.stdout.startswith(f"[[{math.sin(0.5)}, {math.cos(0.5)}]] reference (compiled: ")
    assert "numba" in ran.stdout


def test_nothing_is_imported_before_a_map_runs() -> None:
    ran = python("import sys, reparam, torch, reparam.layers; print('numba' in sys.modules)")
    assert (ran.stdout, ran.stderr) == ("False\n", "")


def test_where_nothing_can_be_kept_it_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []

    def njit(**options: object) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        made.append(options)
        return lambda function: function

    monkeypatch.setattr(loops.numba, "njit", njit)
    function = loops._compiler("contract")(abs)
    assert function is abs
    assert made == [{"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}]


def test_no_rows() -> None:
    assert compiled.decode(torch.empty(0, 3), 4, F32).shape == (0, 4)
    d_r, d_theta = compiled.rows_gradient(None, torch.empty(0, 3), 4, F32, torch.empty(0, 4))
    assert (d_r.shape, d_theta.shape) == ((0,), (0, 3))
