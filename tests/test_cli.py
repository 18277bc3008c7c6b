"""The command line: stdout is the result, stderr the rest, and nothing heavy is imported for what needs only headers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, convert, done, gaussian, python, refused, run
from torch import Tensor

import reparam

ROUNDTRIP = {"checked", "inexact", "bias_inexact", "max_row_error", "rows"}
STATUSES = {"converted", "copied", "skipped"}


def a_model() -> dict[str, Tensor]:
    return {
        "conv1.weight": gaussian(4, 3, 3, 3),
        "conv1.bias": gaussian(4, seed=1),
        "dead.weight": torch.cat([gaussian(2, 6), torch.zeros(1, 6)]),
        "dead.bias": torch.ones(3),
        "bn1.weight": gaussian(4, seed=2),
        "fc[0].weight": gaussian(5, 4, seed=3, dtype=torch.bfloat16),
        "head.weight": gaussian(2, 5, seed=5),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(a_model(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def one_object(text: str) -> dict[str, Any]:
    """stdout is one JSON object and a line's end, nothing else."""
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n"
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_convert_json(to: str, dry: bool, source: Path) -> None:
    ran = done("convert", source, "--to", to, "--json", *(["--dry-run"] if dry else []))
    assert ran.err == ""
    report = one_object(ran.out)
    out = source.with_name(f"model.{to}.safetensors")
    assert report["output"] == (None if dry else str(out))
    assert report["to"] == to
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert set(layers) == {"conv1", "dead", "fc[0]", "head"}
    for layer in layers.values():
        assert {"name", "from", "to", "status", "reason"} <= set(layer)
        assert layer["status"] in STATUSES
        assert layer["reason"]
        assert (layer["from"], layer["to"]) == ("sp", to if layer["status"] == "converted" else "sp")
    assert layers["conv1"]["shape"] == [4, 3, 3, 3]
    assert layers["fc[0]"]["dtype"] == "BF16"
    assert set(report["roundtrip"]) == ROUNDTRIP
    assert {other["name"]: other["status"] for other in report["others"]} == {"bn1.weight": "copied"}
    if not dry:
        assert report["bytes_after"] == out.stat().st_size
        assert report["bytes_before"] == source.stat().st_size
        assert report["roundtrip"]["checked"] == 4 * 27 + 3 * 6 + 5 * 4
        assert report["roundtrip"]["rows"] == 4 + 3 + 5
        assert 0 <= report["roundtrip"]["max_row_error"] <= 2e-7
        assert report["roundtrip"]["inexact"] == sum(layer.get("inexact", 0) for layer in layers.values())
        assert layers["dead"].get("scale") == ("inside" if to == "gmp" else None)


def test_where_weights_are_inexact_is_told(tmp_path: Path) -> None:
    """By their index; and the table says so too."""
    weight = torch.tensor([[0.5, 1e-5, -1.0], [1e-5, 0.0, -1.0], [1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    save_file({"fc.weight": weight}, tmp_path / "m.safetensors")
    report = convert(tmp_path / "m.safetensors", "gmp", tmp_path / "out.safetensors")
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")["fc.weight"]
    different = torch.nonzero(again != weight).tolist()
    (layer,) = report["layers"]
    assert layer["inexact"] == len(different) >= 1
    assert layer["inexact_at"] == different
    table = done("convert", tmp_path / "m.safetensors", "--to", "gmp").out
    assert f"fc.weight{different[0]}" in table


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("held", ["sp", "wn", "gmp"])
def test_inspect_json(held: str, stats: bool, source: Path) -> None:
    path = source
    if held != "sp":
        path = source.with_name(f"model.{held}.safetensors")
        convert(source, held, path, "--include", "*")
    ran = done("inspect", path, "--json", *(["--stats"] if stats else []))
    assert ran.err == ""
    found = one_object(ran.out)
    assert found["path"] == str(path)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert set(layers) == {"conv1", "dead", "fc[0]", "head"}
    assert {layer["kind"] for layer in layers.values()} == {held}
    conv = layers["conv1"]
    assert (conv["shape"], conv["units"], conv["fan_in"], conv["axis"]) == ([4, 3, 3, 3], 4, 27, 0)
    assert layers["fc[0]"]["dtype"] == "BF16"
    assert layers["fc[0]"]["stored"] == ("F32" if held == "gmp" else "BF16")
    assert [other["name"] for other in found["others"]] == ["bn1.weight"]
    assert found["tied"] == {}
    if held == "sp":
        assert found["parameters"] == sum(t.numel() for t in a_model().values())
        assert found["bytes"] == sum(t.numel() * t.element_size() for t in a_model().values())
    if stats:
        norms = a_model()["dead.weight"].double().norm(dim=1)
        statistics = layers["dead"]["statistics"]
        assert statistics["smallest"] == 0
        assert statistics["dead"] == 1
        assert statistics["largest"] == pytest.approx(norms.max().item(), rel=2e-7)
        assert statistics["zeros"] == pytest.approx(6 / 18)
    else:
        assert not any("statistics" in layer for layer in layers.values())


def test_tables_name_every_layer(source: Path) -> None:
    for command in (
        ["inspect", source], ["inspect", source, "--stats"], ["convert", source, "--to", "gmp", "--dry-run"],
        ["convert", source, "--to", "gmp"],
    ):  # fmt: skip
        ran = done(*command)
        assert ran.err == ""
        lines = ran.out.splitlines()
        for name in ("conv1", "dead", "fc[0]", "head"):
            assert any(line.startswith(name + " ") for line in lines), (name, ran.out)
        assert "bn1.weight" in ran.out
        assert "\x1b" not in ran.out, "no colour where stdout is no terminal"
        assert max(map(len, lines)) <= 200
    assert "not bit for bit" in ran.out
    assert "scale inside" in ran.out
    assert "--include head" in ran.out.replace("\n", " ")
    assert str(source.with_name("model.gmp.safetensors")) in ran.out


def test_gmp_of_a_narrow_model_says_that_it_grows(tmp_path: Path) -> None:
    save_file({"fc.weight": gaussian(64, 64, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    ran = done("convert", tmp_path / "m.safetensors", "--to", "gmp")
    assert "float32, whatever the weights were" in ran.out
    assert "×)" in ran.out


def test_names_are_not_markup(tmp_path: Path) -> None:
    save_file(
        {"[bold]x[/bold].weight": gaussian(3, 3), "[red].weight": gaussian(3, 3)}, tmp_path / "m.safetensors"
    )
    out = done("inspect", tmp_path / "m.safetensors").out
    assert "[bold]x[/bold]" in out
    assert "[red]" in out


def test_version() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "reparam", "--version"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"reparam {reparam.__version__}\n", "")
    assert run("--version").out == ran.stdout


def test_help_and_headers_need_no_torch(source: Path, tmp_path: Path) -> None:
    """One interpreter for all of them: torch would stay imported."""
    code = (
        "import sys; from reparam.cli.main import main\n"
        "for line in sys.argv[1:]:\n"
        "    code = main(line.split('|'))\n"
        "    print(line.split('|')[0], code, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    convert(source, "gmp", tmp_path / "g.safetensors")
    commands = [
        "--help", "convert|--help", "inspect|--help", "--version", f"inspect|{source}", f"inspect|{source}|--json",
        f"inspect|{tmp_path / 'g.safetensors'}", f"convert|{source}|--to|wn|--dry-run", f"inspect|{tmp_path / 'gone'}",
    ]  # fmt: skip
    ran = python(code, *commands)
    told = [line for line in ran.stderr.splitlines() if not line.startswith("error: ")]
    assert len(told) == len(commands), ran.stderr
    assert all(line.endswith(" False") for line in told), told
    for name in ("convert", "inspect", "finetune", "export", "bench", "demo"):
        assert name in ran.stdout
    assert "traceback" not in ran.stderr.lower()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"")
    for arguments in (
        ["--debug", "inspect", tmp_path / "m.safetensors"],
        ["inspect", tmp_path / "m.safetensors", "--debug"],
    ):
        ran = run(*arguments)
        assert ran.code == 2
        assert "Traceback (most recent call last)" in ran.err
        assert ran.err.splitlines()[-1].startswith("error: ")
    refused("inspect", tmp_path / "m.safetensors", naming=("m.safetensors",))


def test_help_exits_with_zero_and_nothing_given_with_two() -> None:
    assert run("--help").code == 0
    ran = run()
    assert ran.code == 2
    assert "convert" in ran.out + ran.err


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_closed_pipe_is_no_error(options: list[str], source: Path) -> None:
    """``reparam inspect … | head -1``."""
    command = [sys.executable, "-m", "reparam", "inspect", str(source), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT.parent
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (-signal.SIGPIPE, b""), "ended by the pipe, as any filter"


def test_ctrl_c_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam.checkpoint import running

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "write", interrupted)
    ran = run("convert", source, "--to", "gmp")
    assert ran.code == 130
    assert ran.err.count("\n") == 1
    assert [path.name for path in source.parent.iterdir()] == ["model.safetensors"]


def test_a_terminal_that_knows_no_arrows(source: Path) -> None:
    """An ASCII locale: the table comes with question marks, not with an error after the file was written."""
    command = [sys.executable, "-m", "reparam", "convert", str(source), "--to", "gmp"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    ran = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT.parent, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"sp ? gmp" in ran.stdout
