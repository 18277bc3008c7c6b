"""``reparam bench kernel``: what it measures is right, and what it prints says it all. Never how fast."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from support import assert_one_line, done, gaussian, run

from reparam.bench import kernel
from reparam.kernels.hyperspherical import decode, encode

TINY = ("--max-weights", 2000, "--repeats", 2)
SHAPES = [(64, 27), (100, 1)]
EXACT = 1e-12


def test_json_holds_every_shape_and_job() -> None:
    ran = done("bench", "kernel", *TINY, "--json")
    value = ran.json
    assert value["what"] == "kernel"
    assert value["settings"] == {
        "repeats": 2, "dtype": "float32", "device": "cpu", "pass": "forward + backward",
    }  # fmt: skip
    assert value["machine"]["torch"] == torch.__version__
    assert value["machine"]["torch_threads"] == torch.get_num_threads()
    assert [(tuple(r["shape"]), r["name"]) for r in value["results"]] == [
        (shape, job) for shape in SHAPES for job in kernel.JOBS
    ]
    for result in value["results"]:
        assert result["seconds"] > 0
        for base in ("weight_norm", "naive", "copy"):
            assert result[f"to_{base}"] > 0
    for name, key in (("torch._weight_norm", "to_weight_norm"), ("copy", "to_copy")):
        assert {r[key] for r in value["results"] if r["name"] == name} == {1.0}
    assert ran.err.splitlines() == [f"{a} × {b}: 2 repeats of 4 jobs" for a, b in SHAPES]


def test_the_table_has_the_ratios_the_bars_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.BARS, (64, 27), kernel.Bar(to_weight_norm=6.0, to_naive=0.5))
    ran = done("bench", "kernel", *TINY)
    lines = ran.out.splitlines()
    assert lines[0].split() == ["shape", "job", "to", "weight", "norm", "to", "naive", "to", "copy", "ms"]
    held = [line for line in lines if "bar" in line]
    assert len(held) == 1
    assert held[0].startswith("64×27")
    assert "reparam" in held[0]
    assert held[0].index("(bar 6×)") < held[0].index("(bar 0.5×)")
    assert sum(line.startswith("100×1") for line in lines) == len(kernel.JOBS)
    last = lines[-1]
    assert last.startswith("forward + backward in float32, 2 repeats; ")
    assert f"torch {torch.__version__}" in last
    assert "thread" in last


def test_the_bars_are_the_contracts() -> None:
    assert list(kernel.BARS.items()) == [((4096, 4096), kernel.Bar(6.0, 0.5))]
    assert set(kernel.BARS) <= set(kernel.SHAPES)
    assert {(64, 27), (100, 1), (512, 4608), (4096, 4096), (11008, 4096)} == set(kernel.SHAPES)


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
    ],
)
def test_nothing_to_measure_is_refused(options: tuple[object, ...], naming: str) -> None:
    ran = run("bench", "kernel", *options)
    assert_one_line(ran)
    assert naming in ran.err
