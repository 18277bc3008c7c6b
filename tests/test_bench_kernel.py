"""``reparam bench kernel``: what it measures is right, and what it prints says it all. Never how fast."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
import torch
from support import assert_one_line, done, gaussian, run

from reparam.bench import kernel
from reparam.kernels import backend
from reparam.kernels.hyperspherical import decode, encode

TINY = ("--max-weights", 2000, "--repeats", 2, "--device", "cpu")
SHAPES = [(64, 27), (100, 1)]
EXACT = 1e-12


def test_json_holds_every_shape_and_job() -> None:
    ran = done("bench", "kernel", *TINY, "--json")
    value = ran.json
    assert value["what"] == "kernel"
    assert value["settings"] == {
        "repeats": 2, "dtype": "float32", "device": "cpu", "backend": backend.name(torch.empty(1, 1)),
        "pass": "forward + backward",
    }  # fmt: skip
    assert value["machine"]["torch"] == torch.__version__
    assert value["machine"]["torch_threads"] == torch.get_num_threads()
    assert [(tuple(r["shape"]), r["name"]) for r in value["results"]] == [
        (shape, job) for shape in SHAPES for job in kernel.JOBS
    ]
    for result in value["results"]:
        assert result["seconds"] > 0
        elements = result["shape"][0] * result["shape"][1]
        passes = 4 if result["name"] == "copy" else 5
        assert result["gigabytes_per_second"] == pytest.approx(
            passes * 4 * elements / result["seconds"] / 1e9, rel=EXACT
        )
        for base in ("weight_norm", "naive", "copy"):
            assert result[f"to_{base}"] > 0
    for name, key in (("torch._weight_norm", "to_weight_norm"), ("copy", "to_copy")):
        assert {r[key] for r in value["results"] if r["name"] == name} == {1.0}
    assert ran.err.splitlines() == [f"{a} × {b}: 2 repeats of 4 jobs" for a, b in SHAPES]


def test_the_table_has_the_ratios_the_bars_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    running = kernel.BARS[backend.choose(torch.empty(1, 1)).name]
    monkeypatch.setitem(running, (64, 27), kernel.Bar(to_weight_norm=6.0, to_naive=0.5, bandwidth=0.8))
    ran = done("bench", "kernel", *TINY)
    lines = ran.out.splitlines()
    headings = ["shape", "job", "to weight norm", "to naive", "to copy", "GB/s", "of copy's", "ms"]
    assert lines[0].split() == " ".join(headings).split()
    held = [line for line in lines if "bar" in line]
    assert len(held) == 1
    assert held[0].startswith("64×27")
    assert "reparam" in held[0]
    assert held[0].index("(bar 6×)") < held[0].index("(bar 0.5×)") < held[0].index("(bar 80%)")
    assert sum(line.startswith("100×1") for line in lines) == len(kernel.JOBS)
    last = lines[-1]
    ran_by = backend.name(torch.empty(1, 1))
    assert last.startswith(f"forward + backward in float32 on cpu, the map by {ran_by}, 2 repeats; ")
    assert f"torch {torch.__version__}" in last
    assert "thread" in last


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(kernel, "existing_device", lambda name: asked.append(name) or "cpu")
    kernel.bench_kernel(1, lambda what: None, 2000)
    ran = done("bench", "kernel", "--max-weights", 2000, "--repeats", 1)
    assert asked == ["auto", "auto"]
    assert ran.err.splitlines() == [f"{a} × {b}: 1 repeat of 4 jobs" for a, b in SHAPES]


def test_the_picture_is_named(tmp_path: Path) -> None:
    picture = tmp_path / "ratios.PNG"
    ran = done("bench", "kernel", *TINY, "--plot", picture)
    assert ran.out.splitlines()[-1] == f"wrote {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_bars_are_the_contracts() -> None:
    square, wide = (4096, 4096), (11008, 4096)
    on_gpu = kernel.Bar(1.0, bandwidth=0.8)
    assert {
        "reference": {square: kernel.Bar(6.0, 0.5)},
        "compiled": {square: kernel.Bar(2.0, 0.5)},
        "triton": {square: on_gpu, wide: on_gpu},
    } == kernel.BARS
    assert {(64, 27), (100, 1), (512, 4608), square, wide} == set(kernel.SHAPES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_move_less_and_have_no_bar(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = kernel.BARS[backend.choose(torch.empty(1, 1)).name]
    monkeypatch.setitem(running, (64, 27), kernel.Bar(6.0))
    value = done("bench", "kernel", *TINY, "--dtype", dtype, "--json").json
    assert value["settings"]["dtype"] == dtype
    for result in value["results"]:
        assert result["bar"] is None
        bytes_each = 2 * 2 + (2 if result["name"] == "copy" else 3) * 4
        moved = result["gigabytes_per_second"] * 1e9 * result["seconds"]
        assert moved == pytest.approx(bytes_each * result["shape"][0] * result["shape"][1], rel=EXACT)


def test_ratios_are_medians_of_those_within_one_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down between repeats changes no ratio. The first repeat is warm-up."""
    slow = iter([50.0] * 4 + [1.0] * 4 + [10.0] * 4 + [3.0] * 4)
    seconds = {name: 2.0**i for i, name in enumerate(kernel.JOBS)}
    names = iter(kernel.JOBS * 4)
    monkeypatch.setattr(kernel, "_time", lambda job, inner, device: next(slow) * seconds[next(names)])
    results = kernel._measure((64, 27), 3, "float32", "cpu")
    for result in results:
        assert result.seconds == median([1.0, 10.0, 3.0]) * seconds[result.name]
        assert result.to_weight_norm == seconds[result.name] / 2
        assert result.to_naive == seconds[result.name] / 4
        assert result.to_copy == seconds[result.name]
        assert result.bandwidth == (1 if result.name == "copy" else 5 / 4) / seconds[result.name]


@pytest.mark.parametrize("n", [1, 2, 27])
def test_the_naive_formula_is_the_map(n: int) -> None:
    """What is compared computes the same, or its time says nothing."""
    r, theta = encode(gaussian(5, n, dtype=torch.float64), torch.float64)
    expected = decode(theta, n, torch.float64, r)
    assert float((kernel._naive(r, theta, n) - expected).norm() / expected.norm()) <= EXACT


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (("--max-weights", 99), "--max-weights 99: the smallest shape has 100"),
        (("--repeats", 0), "--repeats"),
        (("--dtype", "float8"), "--dtype float8: one of float32, bfloat16, float16"),
        (("--device", "abacus"), "--device abacus: torch finds no such device here"),
        (("--plot", "no/such/folder.png"), "no such folder"),
        (("--plot", "chart.pdf"), "--plot chart.pdf: what is drawn is a PNG file: name it chart.png"),
    ],
)
def test_nothing_to_measure_is_refused(options: tuple[object, ...], naming: str) -> None:
    ran = run("bench", "kernel", *options)
    assert_one_line(ran)
    assert naming in ran.err
