"""What the README shows is true: its commands are the ones that run, its options exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from reparam.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = README.partition("<!-- demo:begin -->\n```text\n")[2].partition("\n```\n<!-- demo:end -->")[0]
WHOLE = README.partition("<!-- whole:begin -->\n```text\n")[2].partition("\n```\n<!-- whole:end -->")[0]
FOUR = README.partition("<!-- four:begin -->\n```text\n")[2].partition("\n```\n<!-- four:end -->")[0]
NET = README.partition("<!-- net:begin -->\n```python\n")[2].partition("```\n<!-- net:end -->")[0]
SHOWN = README.replace(DEMO, "").replace(WHOLE, "").replace(FOUR, "")
COMMANDS = re.findall(r"^\$ reparam (?!bench)(\w+ .*?)(?: +#.*)?$", SHOWN, flags=re.MULTILINE)
BENCHMARKS = re.findall(r"^\$ reparam (bench .*)$", SHOWN, flags=re.MULTILINE)


def test_ci_calls_the_test_command_word_for_word() -> None:
    command = next(line for line in README.splitlines() if line.startswith("python3") and "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_option_in_the_table_exists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "--help"])
    known = set(re.findall(r"--[a-z-]+|-o\b", capsys.readouterr().out))
    rows = re.findall(r"^\| (`-.*?) \|", README, flags=re.MULTILINE)
    shown = set(re.findall(r"--[a-z-]+|-o\b", " ".join(rows)))
    assert shown
    assert shown <= known


def test_the_pseudocode_is_the_map() -> None:
    """The right-hand column of the Concepts section, run as it stands."""
    from math import cos, sin

    import torch

    from reparam.kernels.hyperspherical import decode

    block = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "# GmP" in b)
    lines = block.splitlines()
    column = lines[0].index("# GmP")
    code = "\n".join(line[column:] for line in lines)
    scope: dict[str, object] = {"sin": sin, "cos": cos}
    exec(code, scope)
    theta = [0.3, -1.1, 2.5]
    found = scope["weight"](1.7, theta)  # type: ignore[operator]
    expected = decode(
        torch.tensor([theta], dtype=torch.float64), 4, torch.float64, torch.tensor([1.7], dtype=torch.float64)
    )
    torch.testing.assert_close(torch.tensor([found], dtype=torch.float64), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_shown_parse(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They name files that are not there: the one line must be about the file, not about the usage."""
    monkey = [word.replace("DIR", str(tmp_path)) for word in line.split()]
    assert main(monkey) == 2
    error = capsys.readouterr().err
    assert "usage" not in error
    assert "no such file" in error.lower()


@pytest.mark.parametrize("line", BENCHMARKS)
def test_benchmarks_shown_parse(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they measure is left out: it takes a GPU, and minutes."""
    from reparam.bench import kernel, step

    def given(*arguments: object) -> dict[str, object]:
        return {"given": [argument for argument in arguments if isinstance(argument, (str, int))]}

    monkeypatch.setattr(kernel, "bench_kernel", given)
    monkeypatch.setattr(step, "bench_step", given)
    assert main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)["given"]
    assert "cuda" in found
    assert ("bfloat16" in found) == ("bfloat16" in line)


def test_the_demo_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word but for figures, which differ a little from machine to machine."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    assert DEMO
    assert _without_figures(capsys.readouterr().out) == _without_figures(DEMO)


def _without_figures(text: str) -> str:
    # The input with the largest error, and the element where it is, are figures too.
    text = re.sub(r"linear\[.*?\], input \[.*?\] at scale \S+", "linear", text.strip())
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\d[\d,.]*(e-?\d+)?", "#", text)


def test_the_whole_model_conversion_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the files the demo leaves, word for word but for figures."""
    import reparam.demo

    data = tmp_path / "reparam-demo" / "data"
    shutil.copytree(Path(reparam.demo.__file__).parent / "data", data)
    (data / "small_cnn.safetensors").rename(data.parent / "small_cnn.safetensors")
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"^\$ reparam (.*)\n((?:(?!\$).*\n?)*)", WHOLE, flags=re.MULTILINE)
    assert len(parts) == 2
    for command, output in parts:
        assert main(command.split()) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert _without_figures("\n".join(printed)) == _without_figures(output)


def test_the_four_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the bundled part of the images, and for a few steps: what does not depend on them is printed as shown."""
    import reparam.demo

    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    shutil.copytree(Path(reparam.demo.__file__).parent / "data", "fashion-mnist")
    parts = re.findall(r"^\$ reparam (.*)\n((?:(?!\$).*\n?)*)", FOUR, flags=re.MULTILINE)
    assert [command.split()[0] for command, _ in parts] == ["finetune", "convert", "finetune", "export"]
    for command, output in parts:
        short = re.sub(r"--epochs \d+", "--steps 4", command)
        assert main(short.split()) == 0
        printed = capsys.readouterr().out.strip()
        if short == command:
            assert _without_figures(printed) == _without_figures(output)


def test_the_verifications_shown_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the files that the commands shown before them make of a network."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    save_file(scope["net"]().state_dict(), "model.safetensors")
    whole = ["--arch", "net.py:net", "--mean-norm", "-o", "whole.gmp.safetensors"]
    assert main(["convert", "model.safetensors", "--to", "gmp"]) == 0
    assert main(["convert", "model.safetensors", "--to", "gmp", *whole]) == 0
    (export,) = [line for line in COMMANDS if line.startswith("export model.gmp.safetensors --arch")]
    verify = [line for line in COMMANDS if line.startswith("verify")]
    assert len(verify) == 3
    for line in (export, *verify):
        assert main(line.split()) == 0, line


def test_the_whole_model_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines as they stand."""
    import torch
    from torch import nn

    import reparam

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    monkeypatch.chdir(tmp_path)
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "fold_bn" in b)
    x = torch.randn(5, 1, 7, 7)
    scope: dict[str, Any] = {"net": net, "batches": [x]}
    exec(block.replace("\n...", "\n#"), scope)
    assert {outcome.rule for outcome in scope["report"] if outcome.applied} == {
        "fold batch norm", "swap", "place scale", "mean normalization", "calibrate",
    }  # fmt: skip
    assert type(scope["model"]).__name__ == "RewrittenSequential"
    assert type(scope["plain"]) is nn.Sequential
    torch.testing.assert_close(scope["plain"](x), net(x), rtol=0, atol=1e-6)
    assert set(reparam.load_state_dict("model.gmp.safetensors")[1]) == {"0.weight"}


def test_the_loop_of_your_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines as they stand, around one step of training."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    import reparam

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    monkeypatch.chdir(tmp_path)
    plain = net().state_dict()
    save_file(plain, "model.safetensors")
    reparam.convert_checkpoint("model.safetensors", "gmp")
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "apply_records" in b
    )
    step = (
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model(torch.ones(2, 1, 4, 4)).square().sum().backward()\noptimizer.step()"
    )
    assert block.count("\n...") == 1
    scope = {"net": net, "torch": torch}
    exec(block.replace("\n...", "\n" + step + "\n#"), scope)
    folded = scope["plain"].state_dict()  # type: ignore[attr-defined]
    assert list(folded) == list(plain)
    assert all(not torch.equal(folded[key], plain[key]) for key in plain)
