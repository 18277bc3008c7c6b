"""What is converted, where it goes, and what a dry run may do: the options of ``convert``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    bits,
    convert,
    done,
    gaussian,
    python,
    raw_tensors,
    records_of,
    refused,
    run,
    snapshot,
    working_in,
)
from torch import Tensor

from reparam import convert_checkpoint

#: says whether a command imported torch, after the command's own output
WITHOUT_TORCH = (
    "import sys; from reparam.cli.main import main; code = main(sys.argv[1:]);"
    "print(code, 'torch' in sys.modules, file=sys.stderr)"
)


def a_model() -> dict[str, Tensor]:
    return {
        "conv1.weight": gaussian(4, 3, 3, 3),
        "conv1.bias": gaussian(4, seed=1),
        "bn1.weight": gaussian(4, seed=2),
        "blocks.0.fc.weight": gaussian(5, 4, seed=3),
        "blocks.1.fc.weight": gaussian(5, 5, seed=4),
        "head.weight": gaussian(2, 5, seed=5),
        "head.bias": gaussian(2, seed=6),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(a_model(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


NAMES = {
    ("model.safetensors", "gmp"): "model.gmp.safetensors",
    ("model.safetensors", "wn"): "model.wn.safetensors",
    ("model.gmp.safetensors", "sp"): "model.sp.safetensors",
    ("model.wn.safetensors", "gmp"): "model.gmp.safetensors",
    ("resnet20-12fca82f.th", "gmp"): "resnet20-12fca82f.gmp.safetensors",
    ("version.1.2.pth", "gmp"): "version.1.2.gmp.safetensors",
    ("weights.pt", "wn"): "weights.wn.safetensors",
}


@pytest.mark.parametrize(("name", "to"), NAMES)
def test_the_output_stands_beside_the_input(name: str, to: str, tmp_path: Path) -> None:
    held = next((kind for kind in ("gmp", "wn") if f".{kind}." in name), "sp")
    (tmp_path / "made").mkdir()
    save_file(a_model(), tmp_path / "made" / "m.safetensors")
    if held != "sp":
        convert(tmp_path / "made" / "m.safetensors", held, tmp_path / name)
    elif name.endswith(".safetensors"):
        save_file(a_model(), tmp_path / name)
    else:
        torch.save(a_model(), tmp_path / name)
    expected = NAMES[name, to]
    report = done("convert", tmp_path / name, "--to", to, "--json").json
    assert report["output"] == str(tmp_path / expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["made", name, expected])


def test_relative_paths(source: Path) -> None:
    with working_in(source.parent):
        done("convert", "model.safetensors", "--to", "gmp")
        done("convert", "model.safetensors", "--to", "gmp", "-o", "other.safetensors")
    assert (source.parent / "model.gmp.safetensors").read_bytes() == (
        source.parent / "other.safetensors"
    ).read_bytes()


def statuses(report: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {layer["name"]: layer["status"] for layer in report["layers"]}


def test_the_default_takes_all_but_the_usual_names_of_output_layers(source: Path) -> None:
    report = done("convert", source, "--to", "gmp", "--json").json
    assert statuses(report) == {
        "conv1": "converted", "blocks.0.fc": "converted", "blocks.1.fc": "converted", "head": "skipped",
    }  # fmt: skip
    (reason,) = [layer["reason"] for layer in report["layers"] if layer["name"] == "head"]
    assert "--include head" in reason
    found = load_file(source.with_name("model.gmp.safetensors"))
    assert bits(found["head.weight"]) == bits(a_model()["head.weight"])


@pytest.mark.parametrize(
    "name", ["lm_head", "classifier", "model.embed_tokens", "wte", "transformer.wpe", "score"]
)
def test_names_on_the_list(name: str, tmp_path: Path) -> None:
    save_file({f"{name}.weight": gaussian(4, 4), "fc.weight": gaussian(4, 4)}, tmp_path / "m.safetensors")
    assert (
        statuses(done("convert", tmp_path / "m.safetensors", "--to", "gmp", "--json").json)[name] == "skipped"
    )
    report = convert(tmp_path / "m.safetensors", "wn", tmp_path / "all.safetensors", "--include", "*")
    assert set(statuses(report).values()) == {"converted"}


SELECTIONS = {
    ("--include", "blocks.*"): {"blocks.0.fc", "blocks.1.fc"},
    ("--include", "head"): {"head"},
    ("--include", "head.weight"): {"head"},
    ("--include", "*", "--exclude", "blocks.*"): {"conv1", "head"},
    ("--exclude", "conv*"): {"blocks.0.fc", "blocks.1.fc"},
    ("--exclude", "conv1", "--exclude", "blocks.0.*"): {"blocks.1.fc"},
    ("--include", "conv1", "--include", "head"): {"conv1", "head"},
    ("--include", "blocks.[1]*"): {"blocks.1.fc"},
}


@pytest.mark.parametrize("options", SELECTIONS)
def test_globs_choose(options: tuple[str, ...], source: Path) -> None:
    report = convert(source, "gmp", source.with_name("out.safetensors"), *options)
    assert {name for name, status in statuses(report).items() if status == "converted"} == SELECTIONS[options]
    assert all(layer["reason"] for layer in report["layers"])
    assert {
        key.removesuffix(".weight") for key in records_of(source.with_name("out.safetensors"))
    } == SELECTIONS[options]


def test_going_back_takes_every_layer_unless_told(source: Path) -> None:
    gmp = source.with_name("gmp.safetensors")
    convert(source, "gmp", gmp, "--include", "*")
    report = convert(gmp, "sp", source.with_name("sp.safetensors"))
    assert set(statuses(report).values()) == {"converted"}
    part = source.with_name("part.safetensors")
    report = convert(gmp, "sp", part, "--include", "head")
    assert statuses(report) == {n: "converted" if n == "head" else "skipped" for n in statuses(report)}
    assert set(records_of(part)) == {"conv1.weight", "blocks.0.fc.weight", "blocks.1.fc.weight"}
    convert(part, "sp", source.with_name("all.safetensors"))
    first, second = (load_file(source.with_name(name)) for name in ("sp.safetensors", "all.safetensors"))
    assert {k: bits(v) for k, v in first.items()} == {k: bits(v) for k, v in second.items()}


def test_a_mixed_file_goes_to_one_parameterization(source: Path) -> None:
    """WN and SP layers of one file, to GmP."""
    mixed = source.with_name("mixed.safetensors")
    convert(source, "wn", mixed, "--include", "blocks.*")
    report = convert(mixed, "gmp", source.with_name("gmp.safetensors"))
    assert {layer["name"]: layer["from"] for layer in report["layers"]} == {
        "conv1": "sp", "blocks.0.fc": "wn", "blocks.1.fc": "wn", "head": "sp",
    }  # fmt: skip


def test_what_is_there_already_is_copied(source: Path) -> None:
    gmp = source.with_name("gmp.safetensors")
    convert(source, "gmp", gmp)
    report = convert(gmp, "gmp", source.with_name("more.safetensors"), "--include", "*")
    assert statuses(report)["head"] == "converted"
    assert {layer["reason"] for layer in report["layers"] if layer["status"] == "copied"} == {"already gmp"}
    before, after = raw_tensors(gmp), raw_tensors(source.with_name("more.safetensors"))
    assert {key: after[key] for key in before if not key.startswith("head")} == {
        key: value for key, value in before.items() if not key.startswith("head")
    }
    refused("convert", gmp, "--to", "gmp", naming=("gmp.safetensors", "already gmp"), leaving=source.parent)


# A row that does not come back bit for bit in bfloat16, one that does not in float32, and one that always does.
INEXACT = {
    torch.bfloat16: torch.tensor([[1e-5, -1.0, 0.5], [0.5, 1e-5, -1.0]], dtype=torch.bfloat16),
    torch.float32: gaussian(8, 12),
}


@pytest.mark.parametrize("dtype", INEXACT)
@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_exact_leaves_what_would_not_come_back(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a.weight": INEXACT[dtype], "b.weight": torch.eye(4, dtype=dtype), "a.bias": torch.ones(len(INEXACT[dtype]), dtype=dtype)}  # fmt: skip
    save_file(state, tmp_path / "m.safetensors")
    loose = convert(tmp_path / "m.safetensors", to, tmp_path / "loose.safetensors")
    report = convert(tmp_path / "m.safetensors", to, tmp_path / "exact.safetensors", "--exact")
    inexact = {layer["name"] for layer in loose["layers"] if layer["inexact"] + layer["bias_inexact"]}
    assert inexact == (set() if to == "wn" and dtype == torch.bfloat16 else {"a"})
    assert {name for name, status in statuses(report).items() if status == "skipped"} == inexact
    assert report["roundtrip"]["inexact"] == report["roundtrip"]["bias_inexact"] == 0
    convert(tmp_path / "exact.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")
    assert {k: bits(v) for k, v in again.items()} == {k: bits(v) for k, v in state.items()}


def test_exact_may_leave_nothing(tmp_path: Path) -> None:
    save_file({"a.weight": gaussian(8, 12)}, tmp_path / "m.safetensors")
    line = refused(
        "convert",
        tmp_path / "m.safetensors",
        "--to",
        "gmp",
        "--exact",
        naming=("m.safetensors",),
        leaving=tmp_path,
    )
    assert "--theta-dtype float64" in line
    done("convert", tmp_path / "m.safetensors", "--to", "gmp", "--exact", "--theta-dtype", "float64")


def test_a_dry_run_writes_nothing_and_imports_no_torch(source: Path) -> None:
    before = snapshot(source.parent)
    ran = python(WITHOUT_TORCH, "convert", source, "--to", "gmp", "--dry-run", "--json")
    assert ran.stderr.split() == ["0", "False"]
    assert '"planned_output"' in ran.stdout
    assert snapshot(source.parent) == before
    planned = run("convert", source, "--to", "gmp", "--dry-run", "--json").json
    assert planned["output"] is None
    report = done("convert", source, "--to", "gmp", "--json").json
    assert planned["planned_output"] == report["output"]
    assert (planned["bytes_before"], planned["bytes_after"]) == (
        report["bytes_before"],
        report["bytes_after"],
    )
    assert report["bytes_after"] == source.with_name("model.gmp.safetensors").stat().st_size
    assert statuses(planned) == statuses(report)


def test_a_dry_run_looks_at_no_value(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.full((4, 4), torch.nan)}, tmp_path / "m.safetensors")
    assert run("convert", tmp_path / "m.safetensors", "--to", "gmp", "--dry-run").code == 0


def test_progress_is_told_of_every_byte(source: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    convert_checkpoint(source, "gmp", progress=lambda *now: seen.append(now))
    amounts = [now[0] for now in seen]
    assert amounts == sorted(amounts)
    assert {name for _, _, name in seen} >= {"conv1", "blocks.0.fc", "head.weight"}
    total = sum(len(data) for _, _, data in raw_tensors(source.with_name("model.gmp.safetensors")).values())
    assert seen[-1][0] == total
    assert seen[0][0] == 0, "told at once of how much there is"
    assert all(total <= whole for _, whole, _ in seen)
