"""What people read: tables on a terminal, and words that say what is so."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from arch_cases import write_arch, write_checkpoint
from reparam.cli.main import main
from safetensors.torch import save_file
from support import convert, done, gaussian, refused
from torch import nn

from reparam import Outcome
from reparam import convert as convert_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, *arguments: object) -> list[str]:
    """The lines a command prints on a terminal so wide, without colours."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", terminal)
    assert main([str(argument) for argument in arguments]) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()


def table_of(lines: list[str]) -> list[str]:
    return lines[: lines.index("")]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_rules_fit_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason in several lines where it must be, and none of it lost."""
    source, arch = write_checkpoint(write_arch(tmp_path), tmp_path), write_arch(tmp_path)
    command = ("convert", source, "--arch", arch, "--to", "gmp", "--dry-run")
    told = [rule["why"] for rule in done(*command, "--json").json["rules"]]
    lines = table_of(on_terminal(monkeypatch, columns, *command))
    assert max(map(len, lines)) <= columns
    start = lines[0].index("what would be done")
    reasons = "".join(line[start:].strip() for line in lines[2:]).replace(" ", "")
    assert "which is no positively homogeneous activation".replace(" ", "") in reasons
    for why in told:
        assert re.sub("`[^`]*`.*", "", why).replace(" ", "") in reasons


@pytest.mark.parametrize("columns", [40, 80])
def test_names_stay_whole_on_any_terminal(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "encoder.layers.0.self_attention.query_projection_with_a_name"
    save_file({f"{name}.weight": gaussian(4, 4), "head.weight": gaussian(4, 4)}, tmp_path / "m.safetensors")
    command = ("convert", tmp_path / "m.safetensors", "--to", "gmp", "--dry-run")
    lines = on_terminal(monkeypatch, columns, *command)
    assert any(line.startswith(f"{name}   ") for line in table_of(lines))
    assert max(map(len, table_of(lines))) < len(name) + 40
    reason = "skipped: 1 layer (head): name is on the default list (head); --include head would take it alone"
    assert reason in lines


def test_a_dry_run_says_would(tmp_path: Path) -> None:
    save_file(
        {"fc.weight": gaussian(4, 3), "head.weight": gaussian(4, 4), "bn.weight": gaussian(4)},
        tmp_path / "m.safetensors",
    )
    command = ("convert", tmp_path / "m.safetensors", "--to", "gmp")
    planned = done(*command, "--dry-run").out
    assert "would convert 1 layer: " in planned
    assert "would copy byte for byte: 1 tensor" in planned
    assert "inexact" not in planned
    assert not re.search(r"^(copied|converted|wrote) ", planned, flags=re.MULTILINE)
    made = done(*command).out
    assert re.search(r"^converted 1 layer ", made, flags=re.MULTILINE)
    assert not re.search(r"would (convert|copy|write)", made)


def test_inexact_weights_and_biases_are_told_apart(tmp_path: Path) -> None:
    state = {"fc.weight": gaussian(40, 50), "fc.bias": gaussian(40, seed=1)}
    save_file(state, tmp_path / "m.safetensors")
    report = convert(tmp_path / "m.safetensors", "gmp", tmp_path / "out.safetensors")
    (layer,) = report["layers"]
    assert layer["inexact"] > 0
    assert layer["bias_inexact"] > 1
    out = done("convert", tmp_path / "m.safetensors", "--to", "gmp").out
    assert re.search(rf"^fc .* {layer['inexact']} +{layer['bias_inexact']} +\d", out, flags=re.MULTILINE)


def test_buffers_are_no_parameters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    state = {**model.state_dict(), "position_ids": torch.arange(7), "codes": torch.zeros(5, dtype=torch.int8)}
    save_file(state, tmp_path / "m.safetensors")
    found = done("inspect", tmp_path / "m.safetensors", "--json").json
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) + 5  # quantized weights count
    assert found["buffers"] == sum(b.numel() for b in model.buffers()) + 7
    out = done("inspect", tmp_path / "m.safetensors").out
    assert f"{found['parameters']:,} parameters and {found['buffers']} in buffers" in out


def test_how_layers_are_read_is_no_warning(tmp_path: Path) -> None:
    save_file({"conv.weight": gaussian(4, 3, 3, 3)}, tmp_path / "m.safetensors")
    for command in (["inspect"], ["convert", "--to", "gmp", "--dry-run"]):
        out = done(command[0], tmp_path / "m.safetensors", *command[1:]).out
        assert "1 layer: units taken on axis 0 (--axis GLOB=1 if transposed): conv\n" in out
        assert "assumed" not in out


def test_layers_stand_in_the_files_order_there_and_back(tmp_path: Path) -> None:
    """float32 angles stand before bfloat16 weights in a file; layers where their names say."""
    state = {
        f"{name}.weight": gaussian(4, 4, dtype=torch.bfloat16) for name in ("a.fc", "b.head", "c.fc", "d.0")
    }
    save_file(state, tmp_path / "m.safetensors")
    expected = [
        layer["name"] for layer in done("inspect", tmp_path / "m.safetensors", "--json").json["layers"]
    ]
    convert(tmp_path / "m.safetensors", "gmp", tmp_path / "g.safetensors")
    back = convert(tmp_path / "g.safetensors", "sp", tmp_path / "s.safetensors")
    assert [layer["name"] for layer in back["layers"]] == expected == ["a.fc", "b.head", "c.fc", "d.0"]
    for name in ("g", "s"):
        listed = done("inspect", tmp_path / f"{name}.safetensors", "--json").json["layers"]
        assert [layer["name"] for layer in listed] == expected


def test_files_of_another_order_keep_it(tmp_path: Path) -> None:
    torch.save(OrderedDict((f"{name}.weight", gaussian(4, 4)) for name in ("z", "a", "m")), tmp_path / "m.pt")
    listed = done("inspect", tmp_path / "m.pt", "--json").json["layers"]
    assert [layer["name"] for layer in listed] == ["z", "a", "m"]


def test_globs_in_one_option(tmp_path: Path) -> None:
    save_file({"a.weight": gaussian(4, 4), "b.weight": gaussian(4, 4)}, tmp_path / "m.safetensors")
    for option in ("--include", "--exclude"):
        refused(
            "convert", tmp_path / "m.safetensors", "--to", "gmp", option, "a,b",
            naming=(f"{option} a,b: matches no layer", f"repeat {option} for each glob"), leaving=tmp_path,
        )  # fmt: skip


def test_an_attentions_output_projection_is_called_that() -> None:
    report: list[Outcome] = []
    model = convert_model(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 2)), report=report)
    (said,) = [o.why for o in report if o.layer == "0.self_attn.out_proj" and o.rule == "swap"]
    assert (
        said == "Linear (the attention's output projection) is GmPLinear (the attention's output projection)"
    )
    convert_model(model, "sp", report=(again := []))
    assert (
        "GmPLinear (the attention's output projection) folded into Linear (the attention's output projection)"
        in {o.why for o in again}
    )
    assert not any("NonDynamically" in o.why for o in [*report, *again] if o.rule in ("swap", "fold"))


def test_means_beside_batch_norm_and_calibration(tmp_path: Path) -> None:
    source, arch = write_checkpoint(write_arch(tmp_path), tmp_path), write_arch(tmp_path)
    command = ("convert", source, "--arch", arch, "--to", "gmp", "--mean-norm", "--dry-run")
    hint = "batch norm follows 2 of the layers whose means are normalized: --fold-bn folds it first"
    out = done(*command).out
    assert hint in out
    assert "the running mean is zero until calibrated" in out
    save_file(
        {"x": torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))}, tmp_path / "x.safetensors"
    )
    out = done(*command, "--fold-bn", "--calibrate", tmp_path / "x.safetensors").out
    assert hint not in out
    assert "the running mean is set by calibration" in out
    assert "until calibrated" not in out
