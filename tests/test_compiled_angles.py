"""Weights to angles in compiled loops: as right as the reference, and what large checkpoints are converted by."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FLOAT32_ROUNDED, FLOAT64
from safetensors.torch import save_file
from support import gaussian, python, tensors_of
from torch import Tensor

from reparam.checkpoint import convert_checkpoint, running
from reparam.errors import NonFiniteError
from reparam.kernels import backend, hyperspherical

pytest.importorskip("numba", reason="pip install reparam[fast]")
compiled = pytest.importorskip("reparam.kernels.compiled")
loops = pytest.importorskip("reparam.kernels.compiled_loops")

F32, F64 = torch.float32, torch.float64
BLOCK, LANES = loops.BLOCK, loops.LANES
#: relative to one angle: root, quotient and arctangent are each off by a few ulps at most, a sum of squares by more
FLOAT64_ANGLE = 5e-15
#: half an ulp of float32, where float64 was that far off before
ONCE = FLOAT32_ROUNDED + FLOAT64_ANGLE


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of one number; exact zeros have to be exact."""
    assert not ((expected == 0) & (found != 0)).any()
    return float(((found.double() - expected).abs() / expected.abs().clamp_min(1e-300)).max())


def exact(rows: Tensor) -> Tensor:
    return torch.tensor([[float(a) for a in oracles.exact_angles(row)] for row in rows.tolist()], dtype=F64)


@pytest.mark.skipif(not oracles.vectors(), reason="no vectors: set REPARAM_SHARED")
@pytest.mark.parametrize("case", oracles.vectors(), ids=lambda case: case["name"])
def test_rows_of_the_vectors_have_the_angles_of_60_digits(case: dict[str, list[str]]) -> None:
    """Their weights as float32 holds them, and as they are."""
    wide = oracles.floats(case["weight_hex"])[None]
    radius, theta = compiled.encode(wide, F64)
    expected = oracles.floats(case["theta_equator"])
    assert float((theta[0] - expected).norm()) <= FLOAT64 * float(expected.norm())
    assert relative(radius, oracles.floats([case["r"]])) <= FLOAT64
    rows = wide.float()
    if rows.isfinite().all() and wide.shape[1] <= 1024:
        for dtype, bar in ((F64, FLOAT64_ANGLE), (F32, ONCE)):
            radius, theta = compiled.encode(rows, dtype)
            assert relative(theta, exact(rows)) <= bar
            assert relative(radius, torch.linalg.vector_norm(rows.double(), dim=1)) <= bar


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 129, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1])
@pytest.mark.parametrize("rows", [1, LANES - 1, LANES, 2 * LANES + 1])
def test_agrees_with_the_reference(rows: int, n: int) -> None:
    weight = gaussian(rows, n, seed=n)
    weight[:, ::3] *= 100
    weight[:, 1::5] /= 1e4
    r, expected = hyperspherical.encode(weight.double(), F64)
    for dtype, bar in ((F64, FLOAT64_ANGLE), (F32, ONCE)):
        radius, theta = compiled.encode(weight, dtype)
        assert (radius.dtype, theta.dtype, theta.shape) == (dtype, dtype, expected.shape)
        assert relative(radius, r) <= bar
        assert relative(theta, expected) <= bar


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_what_they_are_in_float32(dtype: torch.dtype) -> None:
    weight = gaussian(7, 300).to(dtype)
    for found, expected in zip(
        compiled.encode(weight, F32), compiled.encode(weight.float(), F32), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200])
def test_float64_weights_are_left_to_the_reference(scale: float) -> None:
    """Their squares may not fit float64."""
    weight = gaussian(5, 40).double() * scale
    for dtype in (F32, F64) if scale == 1 else (F64,):
        for found, expected in zip(
            compiled.encode(weight, dtype), hyperspherical.encode(weight, dtype), strict=True
        ):
            assert torch.equal(found, expected)


def test_a_very_long_row() -> None:
    """Equal entries: one running sum would round every addend to the same side."""
    n = 1_000_000
    weight = torch.full((1, n), 0.1)
    expected = torch.atan(torch.arange(n - 1, 0, -1, dtype=F64).rsqrt())
    radius, theta = compiled.encode(weight, F64)
    assert relative(theta[0], expected) <= 1e-13
    assert relative(radius, weight.double()[:, 0] * math.sqrt(n)) <= 1e-13


ZEROS = [
    [0.0] * 5,
    [3.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, -3.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 2.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, -2.0],
    [-0.0, -0.0, -0.0, -0.0, -2.0],
    [-0.0, 1.0, -0.0, 1.0, -0.0],
    [1.0, 0.0, -2.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, -0.0, -1.0],
]


@pytest.mark.parametrize("at", [0, BLOCK - 3])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_exact_zeros(dtype: torch.dtype, at: int) -> None:
    """Angles of nothing, right angles and straight ones, bit for bit those of the reference; and they come back."""
    rows = torch.zeros(len(ZEROS), BLOCK + 5)
    rows[:, at : at + 5] = torch.tensor(ZEROS)
    for weight in (torch.tensor(ZEROS), rows, rows.flip(1)):
        n = weight.shape[1]
        radius, theta = compiled.encode(weight, dtype)
        r, expected = hyperspherical.encode(weight, dtype)
        whole = (expected == 0) | (expected.abs() >= hyperspherical.right_angle(dtype))
        assert torch.equal(theta[whole], expected[whole])
        assert not (torch.signbit(theta) & (theta == 0)).any()
        assert torch.equal(radius == 0, r == 0)
        oracles.assert_came_back(compiled.decode(theta, n, dtype, radius, F32), weight, dtype)


numbers = st.floats(width=16, allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=6)
    )
)
def test_any_row_comes_back(values: list[list[float]]) -> None:
    for dtype in (F32, torch.float16, torch.bfloat16):
        weight = torch.tensor(values).to(dtype)
        for stored in (F32, F64):
            radius, theta = compiled.encode(weight, stored)
            found = compiled.decode(theta, weight.shape[1], stored, radius, dtype)
            oracles.assert_came_back(found, weight, stored)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 100, 298, 299])
def test_what_is_not_finite_is_refused(value: float, at: int) -> None:
    weight = gaussian(6, 300)
    weight[4, at] = value
    with pytest.raises(NonFiniteError):
        compiled.encode(weight, F32)


def test_norms_that_float32_does_not_hold() -> None:
    for value in (3e38, 1e-45):
        weight = torch.full((1, 300), value)
        radius, _ = compiled.encode(weight, F64)
        assert relative(radius, torch.linalg.vector_norm(weight.double(), dim=1)) <= FLOAT64_ANGLE
    with pytest.raises(NonFiniteError, match="does not fit float32"):
        compiled.encode(torch.full((1, 300), 3e38), F32)


def test_every_number_of_the_result_is_written() -> None:
    """torch fills what is asked for uninitialized with NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for rows, n in ((1, 2), (5, 3), (9, BLOCK + 1), (4, 2 * BLOCK + 1)):
            assert all(found.isfinite().all() for found in compiled.encode(gaussian(rows, n), F32))
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_rows() -> None:
    radius, theta = compiled.encode(torch.empty(0, 4), F32)
    assert (radius.shape, theta.shape) == ((0,), (0, 3))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every checkpoint is a large one; the names of the compiled functions that were called."""
    made: list[str] = []
    monkeypatch.setattr(running, "_WORTH_LOADING", 0)
    for name in ("encode", "decode"):
        function = getattr(compiled, name)
        monkeypatch.setattr(
            compiled, name, lambda *a, _name=name, _function=function: made.append(_name) or _function(*a)
        )
    monkeypatch.setattr(compiled, "prepare", lambda: made.append("prepare"))
    yield made
    assert backend.for_conversion() is backend.REFERENCE


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_large_checkpoints_are_converted_by_it(dtype: torch.dtype, calls: list[str], tmp_path: Path) -> None:
    tensors = {"a.weight": gaussian(50, 300), "a.bias": gaussian(50), "b.weight": gaussian(12, 5, 3, 3)}
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    report = convert_checkpoint(tmp_path / "m.safetensors", "gmp")
    assert set(calls) == {"prepare", "encode", "decode"}
    assert report.to_json()["backend"] == "compiled"
    if dtype == torch.bfloat16:
        assert [layer.fidelity.inexact for layer in report.layers if layer.fidelity] == [0, 0]
    written = tensors_of(tmp_path / "m.gmp.safetensors")
    for key in ("a", "b"):
        weight = tensors[f"{key}.weight"].flatten(1)
        r, theta = hyperspherical.encode(weight.double(), F64)
        assert relative(written[f"{key}.r"], r) <= ONCE
        assert relative(written[f"{key}.theta"], theta) <= ONCE
    calls.clear()
    convert_checkpoint(tmp_path / "m.gmp.safetensors", "sp", output=tmp_path / "back.safetensors")
    assert set(calls) == {"prepare", "decode"}
    for key, value in tensors_of(tmp_path / "back.safetensors").items():
        if value.dim() > 1:
            oracles.assert_came_back(value.flatten(1), tensors[key].flatten(1), F32)


def test_weight_normalization_has_no_use_for_it(calls: list[str], tmp_path: Path) -> None:
    save_file({"a.weight": gaussian(50, 300)}, tmp_path / "m.safetensors")
    convert_checkpoint(tmp_path / "m.safetensors", "wn")
    assert not calls


def test_without_numba_large_checkpoints_are_converted_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "_imported", lambda path: "No module named 'numba'")
    save_file({"a.weight": gaussian(50, 300)}, tmp_path / "m.safetensors")
    report = convert_checkpoint(tmp_path / "m.safetensors", "gmp")
    assert not calls
    assert "reparam[fast]" in report.notes[0]
    assert "No module named 'numba'" in report.notes[0]
    assert report.to_json()["backend"] == "reference"
    expected = hyperspherical.encode(gaussian(50, 300), F32)
    assert torch.equal(tensors_of(tmp_path / "m.gmp.safetensors")["a.theta"], expected[1])


def test_loops_that_cannot_be_built_are_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], tmp_path: Path
) -> None:
    def prepare() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled, "prepare", prepare)
    save_file({"a.weight": gaussian(50, 300)}, tmp_path / "m.safetensors")
    report = convert_checkpoint(tmp_path / "m.safetensors", "gmp")
    assert not calls
    assert "OSError: [Errno 28] No space left on device" in report.notes[0]


def test_a_package_that_is_there_and_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise OSError("Could not find/load shared object file")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    assert backend._imported.__wrapped__("numba") == "OSError: Could not find/load shared object file"


def test_an_interrupt_waits_until_the_loops_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    before, built = signal.getsignal(signal.SIGINT), list[bool]()

    def interrupted(*arguments: object) -> tuple[Tensor, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        built.append(True)
        return torch.ones(1), torch.ones(1, 1)

    monkeypatch.setattr(compiled, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled.prepare()
    assert built == [True, True]
    assert signal.getsignal(signal.SIGINT) is before


READ_ONLY = """
import numpy
given = numpy.from_dlpack
def from_dlpack(tensor):
    array = given(tensor)
    array.flags.writeable = False
    return array
numpy.from_dlpack = from_dlpack
import torch
from reparam.kernels import backend
print(backend.name(torch.ones(1, 1)))
"""


def test_read_only_arrays_are_left_to_the_reference() -> None:
    """As numpy gave them before 2.2.5."""
    ran = python(READ_ONLY)
    assert ran.stderr == ""
    assert ran.stdout.startswith("reference (compiled: numpy ")
    assert "2.2.5 or later" in ran.stdout


SMALL = """
import sys
from reparam.checkpoint import convert_checkpoint
convert_checkpoint(sys.argv[1], "gmp")
print("numba" in sys.modules)
"""


def test_small_checkpoints_load_nothing(tmp_path: Path) -> None:
    save_file({"a.weight": gaussian(50, 300)}, tmp_path / "m.safetensors")
    ran = python(SMALL, tmp_path / "m.safetensors")
    assert (ran.stdout, ran.stderr) == ("False\n", "")
