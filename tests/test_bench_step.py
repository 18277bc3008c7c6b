"""``reparam bench step`` and ``all``: what is measured is what is named, and what is printed and drawn says it. Never how fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from reparam.cli import bench_tables
from support import assert_one_line, done, run
from torch import nn

from reparam.bench import all_benchmarks, export, networks, plot, step
from reparam.graph import fold
from reparam.layers import Reparameterized

#: the same function up to what float32 makes of it
SAME = 1e-4


def tiny(batch_norm: bool) -> nn.Module:
    torch.manual_seed(1)
    first = nn.Conv2d(3, 4, 3, padding=1, bias=not batch_norm)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    return nn.Sequential(first, *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "NETWORKS", {"resnet34": networks.Network(tiny, 8)})


@pytest.mark.parametrize(
    ("name", "convolutions", "parameters"), [("vgg6", 6, 5_089_384), ("resnet34", 36, 21_789_160)]
)
def test_the_networks_are_the_papers(name: str, convolutions: int, parameters: int) -> None:
    """ResNet-34 has 21,797,672, 17,024 of them in batch norms: with as many biases as half of those, 8,512 fewer."""
    network = networks.NETWORKS[name]
    with torch.device("meta"):
        plain, norm = network.make(False), network.make(True)
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == convolutions
    assert sum(isinstance(m, nn.BatchNorm2d) for m in norm.modules()) == convolutions
    assert sum(p.numel() for p in plain.parameters()) == parameters
    biases = sum(m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d))
    assert sum(p.numel() for p in norm.parameters()) == parameters + biases
    assert plain(torch.empty(2, 3, network.pixels, network.pixels, device="meta")).shape == (2, 1000)


def test_variants_are_what_they_are_called(small: None) -> None:
    steps = step._steps("resnet34", 4, 8, "float32", "cpu", False)
    assert tuple(steps) == step.VARIANTS == ("SP", "BN", "WN", "WN+MBN", "GmP", "GmP+MN")
    kinds = {}
    for name, one in steps.items():
        layers = [m for m in one.model.modules() if isinstance(m, Reparameterized)]
        kinds[name] = [(m.form.name, m.mean.kind if m.mean else None) for m in layers]
        assert all(m.training for m in one.model.modules())
    assert kinds == {
        "SP": [], "BN": [], "WN": [("wn", None)], "WN+MBN": [("wn", "mbn")], "GmP": [("gmp", None)],
        "GmP+MN": [("gmp", "mn")],
    }  # fmt: skip
    assert sum(isinstance(m, nn.BatchNorm2d) for m in steps["BN"].model.modules()) == 1
    plain = steps["SP"].model.state_dict()
    for name in ("WN", "GmP"):
        assert all(
            torch.allclose(value, plain[key], atol=SAME)
            for key, value in fold(steps[name].model).state_dict().items()
        )


def test_a_step_trains(small: None) -> None:
    """Forward, backward and optimizer: every parameter moves, and the loss falls on the same batch."""
    for name, one in step._steps("resnet34", 4, 8, "float32", "cpu", False).items():
        one()
        first, before = float(one.loss), [p.detach().clone() for p in one.model.parameters()]
        for _ in range(5):
            one()
        assert float(one.loss) < first, name
        for p, old in zip(one.model.parameters(), before, strict=True):
            assert not torch.equal(p, old), name
        parameters = sum(p.nbytes for p in one.model.parameters())
        buffers = sum(b.nbytes for b in one.model.buffers())
        assert one.held() == 3 * parameters + buffers, name


def test_losses_agree_where_the_function_is_the_same(small: None) -> None:
    losses = {}
    for name, one in step._steps("resnet34", 4, 8, "float32", "cpu", False).items():
        one()
        losses[name] = float(one.loss)
    for name in ("WN", "GmP"):
        assert abs(losses[name] - losses["SP"]) <= SAME * losses["SP"]
    assert abs(losses["BN"] - losses["SP"]) > SAME * losses["SP"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_runs_in_the_type(small: None, dtype: str) -> None:
    one = step._steps("resnet34", 4, 8, dtype, "cpu", False)["GmP"]
    seen: list[torch.dtype] = []
    one.model.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    one()
    assert seen == [getattr(torch, dtype)]


def test_compiled_steps_are_compiled(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    value = step.bench_step(["resnet34"], 2, 1, lambda what: None, compiled=True)
    assert [(r["compiled"], r["name"]) for r in value["results"]] == [
        (way, name) for way in (False, True) for name in step.VARIANTS
    ]
    assert len(compiled) == len(step.VARIANTS)


def test_ratios_are_medians_of_those_within_one_repeat(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = iter([1.0] * 6 + [10.0] * 6 + [3.0] * 6)
    seconds = iter([2.0**i for i in range(6)] * 3)
    monkeypatch.setattr(step, "_time", lambda one, device: next(slow) * next(seconds))
    value = step.bench_step(["resnet34"], 2, 3, lambda what: None)
    for i, result in enumerate(value["results"]):
        assert result["ratio"] == 2.0**i
        assert result["seconds"] == median([1.0, 10.0, 3.0]) * 2.0**i
        assert result["bar"] is None  # on a CPU
        assert result["peak_mb"] is None


def test_the_bars_are_the_contracts(small: None) -> None:
    assert step.BARS == {"GmP": 1.03, "GmP+MN": 1.08}


def test_the_command(small: None, tmp_path: Path) -> None:
    picture = tmp_path / "step.png"
    ran = done("bench", "step", "--batch-size", 2, "--repeats", 1, "--plot", picture, "--json")
    assert ran.json["settings"]["batch_size"] == 2
    assert ran.json["settings"]["pixels"] == {"resnet34": 8}
    assert ran.err.splitlines() == ["resnet34, eager: 1 repeat of 6 steps", f"wrote {picture}"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    ran = run("bench", "step", "--plot", picture)
    assert_one_line(ran)
    assert "exists: --force overwrites it, --plot names another place" in ran.err


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (("--model", "alexnet"), "--model alexnet: one of resnet34"),
        (("--dtype", "int8"), "--dtype int8"),
        (("--device", "abacus"), "--device abacus"),
        (("--batch-size", 0), "--batch-size"),
    ],
)
def test_bad_options_are_one_line(small: None, options: tuple[object, ...], naming: str) -> None:
    ran = run("bench", "step", *options)
    assert_one_line(ran)
    assert naming in ran.err


def results(bar: float | None = None) -> dict[str, Any]:
    common = {"model": "resnet34", "compiled": False, "seconds": 0.5, "loss": 1.0}
    return {
        "what": "step",
        "machine": {"processor": "cpu", "gpu": "H200", "cores": 2, "torch": "2", "date": "today", "torch_threads": 1},
        "settings": {
            "batch_size": 256, "pixels": {"resnet34": 224}, "repeats": 1, "dtype": "bfloat16", "device": "cuda",
            "backend": "triton",
        },
        "results": [
            {"name": "SP", "ratio": 1.0, "bar": None, "peak_mb": 1234.5, **common},
            {"name": "GmP", "ratio": 1.02, "bar": bar, "peak_mb": None, **common},
        ],
    }  # fmt: skip


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench_tables.show(results(1.03))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["resnet34", "eager", "SP", "1.00×", "500.0", "1234"] in lines
    assert ["resnet34", "eager", "GmP", "1.02×", "(bar", "1.03×)", "500.0", "n/a"] in lines
    last = " ".join(lines[-1])
    assert "256 images (resnet34 224×224) in bfloat16 on cuda, the map by triton, 1 repeat; H200" in last


def test_bars_are_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (panel,) = plot.panels(results(1.03))
    assert panel.bars == [("SP", 1.0, None, False), ("GmP", 1.02, 1.03, True)]
    assert "resnet34" in panel.title
    drawn: list[Callable[..., None]] = []
    original = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda axes, one: drawn.append(axes) or original(axes, one))
    plot.plot(results(1.03), tmp_path / "a.png")
    (axes,) = drawn
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.02]
    assert [text.get_text() for text in axes.texts] == ["1.00×", "1.02× (bar 1.03×)"]
    held = [line for line in axes.lines if line.get_color() == plot._BAR]
    assert [list(line.get_xdata()) for line in held] == [[1.03, 1.03]]


def test_all_of_them(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each benchmark's own value, in one JSON, one table, one picture. Conversion and export would take long."""
    converted = {
        "what": "convert",
        "machine": results()["machine"],
        "settings": {"gigabytes": 0.5, "dtype": "BF16", "repeats": 1, "backend": "compiled"},
        "results": [
            {"name": "SP → GmP", "ratio": 3.5, "durable_ratio": 3.0, "seconds": 1.0, "peak_mb": 1.0, "read_mb": 1.0,
             "written_mb": 1.0}
        ],
    }  # fmt: skip
    stage = {"name": "refit", "seconds": 1.0, "ratio": 0.5, "cpu_seconds": 1.0, "cpu_ratio": 0.5}
    exported = {
        "what": "export",
        "machine": results()["machine"],
        "settings": {"model": "SmallCNN", "to": "gmp", "repeats": 1, "turns": 1},
        "stages": [stage],
        "files": [],
    }
    monkeypatch.setattr(all_benchmarks, "bench_convert", lambda *arguments: converted)
    monkeypatch.setattr(export, "bench_export", lambda model, *arguments: exported)
    monkeypatch.setitem(networks.NETWORKS, "vgg6", networks.Network(tiny, 8))  # type: ignore[index]
    file, picture = tmp_path / "all.json", tmp_path / "all.png"
    ran = done("bench", "all", "--quick", "-o", file, "--plot", picture)
    value = json.loads(file.read_text())
    assert (value["what"], list(value["benchmarks"])) == (
        "all",
        ["kernel", "step", "data", "convert", "export"],
    )
    assert all(one["what"] == what for what, one in value["benchmarks"].items())
    for what in value["benchmarks"]:
        assert f"bench {what}\n" in ran.out
    assert len(plot.panels(value)) == 2 + 1 + 1 + 1 + 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ran.out.splitlines()[-2:] == [f"wrote {file}", f"wrote {picture}"]
    assert {line.partition(":")[0] for line in ran.err.splitlines()} == {"kernel", "step", "data"}
    assert_one_line(run("bench", "all", "--quick", "-o", file))
