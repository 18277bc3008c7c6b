"""What ``inspect``, ``convert`` and ``verify`` tell of many layers: in 80 columns, by what matters, with the mend."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arch_cases import write_arch, write_checkpoint
from safetensors.torch import load_file, save_file
from support import convert, done, gaussian, refused, run
from torch import Tensor

from reparam.checkpoint import running
from reparam.kernels.backend import REFERENCE

CHECKPOINTS = (
    "carn/carn_m.pth", "deepsdf_wn/weights.pt", "resnet_cifar10/resnet20-12fca82f.th",
    "silero_vad/silero_vad_16k.safetensors", "ultralight_face/version-slim-320.pth",
)  # fmt: skip


def table_of(out: str) -> list[str]:
    """The lines before the first empty one."""
    lines = [line.rstrip() for line in out.splitlines()]
    return lines[: lines.index("")]


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A dozen layers with long names, as real networks have them."""
    state = {}
    for i in range(12):
        name = f"model.layers.{i}.self_attn.q_proj"
        state |= {
            f"{name}.weight": gaussian(128, 16, 3, 3, seed=i),
            f"{name}.bias": i * gaussian(128, seed=i),
        }
    return saved(tmp_path / "deep.safetensors", state)


def test_tables_fit_eighty_columns(deep: Path) -> None:
    """What all layers have in common stands above the table; names and numbers stand whole, in columns."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    told = {"inspect": "sp", "convert": "sp → gmp"}
    for command in (["inspect", deep], ["inspect", deep, "--stats"], ["convert", deep, "--to", "gmp"]):
        lines = table_of(done(*command).out)
        assert max(map(len, lines)) <= 80
        assert lines[0] == f"every layer: held as {told[str(command[0])]}, dtype F32"
        assert sorted(line.split()[0] for line in lines[3:]) == sorted(names)
        assert len({len(line) for line in lines[2:]}) == 1, "all end where the rule does"
    report = convert(deep, "gmp", deep.with_name("out.safetensors"))
    assert lines[1].split() == ["layer", "shape", "inexact", "biases", "row", "error"]
    for line, layer in zip(lines[3:], report["layers"], strict=True):
        figures = [f"{layer['inexact']:,}", f"{layer['bias_inexact']:,}", f"{layer['max_row_error']:.1e}"]
        assert line.split() == [layer["name"], "128×16×3×3", *figures]
    assert {layer["bias_inexact"] == 0 for layer in report["layers"]} == {True, False}
    ends = {tuple(word.end() for word in re.finditer(r"\S+", line))[2:] for line in lines[3:]}
    assert len(ends) == 1, "numbers stand to the right"


def test_what_differs_stays_in_its_column(deep: Path, tmp_path: Path) -> None:
    state = load_file(deep)
    state["model.layers.3.self_attn.q_proj.weight"] = state["model.layers.3.self_attn.q_proj.weight"].half()
    lines = table_of(done("inspect", saved(tmp_path / "mixed.safetensors", state)).out)
    assert lines[0] == "every layer: held as sp"
    assert [line.split()[2] for line in lines[3:]].count("F16") == 1
    lines = table_of(
        done("inspect", saved(tmp_path / "small.safetensors", {"fc.weight": gaussian(4, 3)})).out
    )
    assert lines[0].split() == ["layer", "held", "as", "shape", "dtype", "units", "fan-in", "bias"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tables_of_real_checkpoints_fit(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "checkpoints" / name
    for command in (
        ["inspect", source],
        ["inspect", source, "--stats"],
        ["convert", source, "--to", "gmp", "-o", tmp_path / "out.safetensors"],
    ):
        assert max(map(len, table_of(done(*command).out))) <= 80


def test_layers_that_are_left_are_told_by_reason(tmp_path: Path) -> None:
    names = [f"{name}_embed" for name in ("face", "line", "page", "time", "word")]
    source = saved(
        tmp_path / "m.safetensors", {f"{n}.weight": gaussian(4, 3) for n in [*names, "fc", "head"]}
    )
    lines = done("convert", source, "--to", "gmp").out.splitlines()
    for name in [*names, "head"]:
        assert any(re.match(rf"{re.escape(name)} +sp +4×3 +F32 +— +—$", line.rstrip()) for line in lines)
    assert [line for line in lines if line.startswith("skipped")] == [
        "skipped: 5 layers (face_embed, line_embed, page_embed and 2 more): name is on the default list "
        "(*embed*); --include face_embed would take it alone, and so on",
        "skipped: 1 layer (head): name is on the default list (head); --include head would take it alone",
    ]
    options = ("--include", "*", "-o", tmp_path / "out.safetensors", "--dry-run")
    mixed = done("convert", tmp_path / "m.gmp.safetensors", "--to", "gmp", *options).out
    assert "would copy: 1 layer (fc): already gmp\n" in mixed


def test_how_layers_are_read_is_one_short_line(tmp_path: Path) -> None:
    state = {f"module.layer{i}.0.conv1.weight": gaussian(4, 4, 3, 3, seed=i) for i in range(9)}
    state |= {f"moe.{i}.experts.up": gaussian(2, 4, 3, seed=i) for i in range(2)}
    source = saved(tmp_path / "m.safetensors", state)
    for command in (["inspect", source], ["convert", source, "--to", "gmp", "--dry-run"]):
        lines = [line.strip() for line in done(*command).out.splitlines() if "if transposed" in line]
        assert lines == [
            "9 layers: units taken on axis 0 (--axis GLOB=1 if transposed): module.layer0.0.conv1 and 8 more",
            "2 layers: units taken on axis 1 (--axis GLOB=2 if transposed): moe.0.experts.up, moe.1.experts.up",
        ]
        assert max(map(len, lines)) <= 100
    options = ("--axis", "module.*=1", "--axis", "moe.*=2", "--dry-run")
    assert "if transposed" not in done("convert", source, "--to", "gmp", *options).out, "as the lines have it"


def test_one_g_an_expert_is_not_one_a_unit(tmp_path: Path) -> None:
    state = {"moe.experts.up": gaussian(2, 4, 3), "fc.weight": gaussian(4, 3)}
    source = saved(tmp_path / "m.safetensors", state)
    convert(source, "wn", tmp_path / "wn.safetensors")
    told = "g is not one a unit, but one an expert, input channel or so: moe.experts.up\n"
    assert told in done("inspect", tmp_path / "wn.safetensors").out
    assert "one a unit" not in done("inspect", source).out


def test_what_mapped_the_angles_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever there are angles, and nowhere else."""
    source, gmp = (
        saved(tmp_path / "m.safetensors", {"fc.weight": gaussian(4, 3)}),
        tmp_path / "m.gmp.safetensors",
    )
    told = "angles mapped by reference (torch's own operations)\n"
    for command in (
        ["convert", source, "--to", "gmp"],
        ["convert", gmp, "--to", "sp"],
        ["convert", gmp, "--to", "wn"],
    ):
        assert told in done(*command, "--force").out
        assert done(*command, "--force", "--json").json["backend"] == "reference"
        assert done(*command, "--force", "--json", "--dry-run").json["backend"] is None
    assert "angles mapped" not in done("convert", source, "--to", "wn", "--force").out
    assert done("convert", source, "--to", "wn", "--force", "--json").json["backend"] is None
    monkeypatch.setattr(running, "fast", lambda plan: nullcontext(replace(REFERENCE, name="compiled")))
    assert "angles mapped by compiled (numba)\n" in done("convert", source, "--to", "gmp", "--force").out
    arch = ("--arch", write_arch(tmp_path))
    network = write_checkpoint(arch[1], tmp_path)
    whole = tmp_path / "whole.safetensors"
    assert told in done("convert", network, *arch, "--to", "gmp", "-o", whole).out
    back = done("convert", whole, *arch, "--to", "sp", "-o", tmp_path / "back.safetensors", "--json").json
    assert back["backend"] == "reference"
    plain = done("convert", network, *arch, "--to", "wn", "-o", tmp_path / "wn.safetensors", "--json").json
    assert plain["backend"] is None


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Layers whose axis is told by a bias, by nothing, and one that is left out."""
    state = {
        "up.weight": gaussian(4, 6, 3), "up.bias": gaussian(6), "conv.weight": gaussian(5, 5, 3), "head.weight": gaussian(4, 4, 3),
        "fc.weight": gaussian(4, 3),
    }  # fmt: skip
    return saved(tmp_path / "m.safetensors", state)


AXES = {
    ("up=1",): ["up=1 (units of up are on axis 1 in any case)"],
    ("head=1",): ["head=1 (it decides no layer that is converted or compared)"],
    ("conv=1",): [],
    ("conv=0",): [],  # settles what would be a guess
    ("*=1", "conv=1"): ["conv=1 (it decides no layer that is converted or compared)"],
    ("[uf]*=1", "f*=0"): ["f*=0 (it decides no layer that is converted or compared)"],
    ("up*=1", "f*=0"): [
        "up*=1 (units of up are on axis 1 in any case)",
        "f*=0 (units of fc are on axis 0 in any case)",
    ],
}


@pytest.mark.parametrize("axes", AXES, ids=" ".join)
def test_an_axis_that_changes_nothing_is_told(axes: tuple[str, ...], shapes: Path) -> None:
    options = [word for axis in axes for word in ("--axis", axis)]
    for dry in ([], ["--dry-run"]):
        out = done("convert", shapes, "--to", "gmp", *options, *dry).out.splitlines()
        assert [line for line in out if "without effect" in line] == [
            f"without effect: --axis {told}" for told in AXES[axes]
        ]


def test_an_axis_that_a_file_records_is_told(shapes: Path) -> None:
    gmp = shapes.with_name("gmp.safetensors")
    convert(shapes, "gmp", gmp)
    report = convert(gmp, "sp", shapes.with_name("sp.safetensors"), "--axis", "*c*=1")
    assert report["notes"] == [
        "without effect: --axis *c*=1 (units of conv and 1 more are on axis 0 in any case)"
    ]
    note = "note: without effect: --axis conv=1 (units of conv are on axis 0 in any case)\n"
    assert note in done("verify", shapes, gmp, "--axis", "conv=1").out
    assert "without effect" not in done("verify", shapes, shapes, "--axis", "conv=1").out
    wrapped = {f"module.{key}": value for key, value in load_file(shapes).items()}
    other = saved(shapes.with_name("wrapped.safetensors"), wrapped)
    assert "without effect" not in run("verify", shapes, other, "--axis", "module.conv=1").out
    refused("verify", shapes, gmp, "--axis", "nope.*=1", naming=("--axis nope.*: matches no layer",))
    refused("verify", shapes, gmp.with_suffix(".onnx"), "--axis", "conv=1", naming=("--axis", "network"))
    refused("verify", shapes, gmp, "--arch", "net.py:net", "--axis", "conv=1", naming=("--axis", "network"))


def test_exact_names_float64_where_that_is_the_mend(tmp_path: Path) -> None:
    """In float32 neither row comes back; in float64 all do but 1e-30 beside 1."""
    state = {"a.weight": gaussian(8, 12), "b.weight": torch.tensor([[1.0, 1e-30]]), "c.weight": torch.eye(3)}
    source = saved(tmp_path / "m.safetensors", state)
    report = convert(source, "gmp", tmp_path / "out.safetensors", "--exact")
    reasons = {layer["name"]: layer["reason"] for layer in report["layers"] if layer["status"] == "skipped"}
    assert re.fullmatch(
        r"--exact: \d+ values would not come back bit for bit; with --theta-dtype float64 all would",
        reasons["a"],
    )
    assert reasons["b"] == "--exact: 1 values would not come back bit for bit"
    wide = convert(source, "gmp", tmp_path / "wide.safetensors", "--exact", "--theta-dtype", "float64")
    reasons = {layer["name"]: layer["reason"] for layer in wide["layers"] if layer["status"] == "skipped"}
    assert reasons == {"b": "--exact: 1 values would not come back bit for bit"}
    only = saved(tmp_path / "b.safetensors", {"b.weight": state["b.weight"]})
    for options in ([], ["--theta-dtype", "float64"]):
        line = refused("convert", only, "--to", "gmp", "--exact", *options, naming=("b.safetensors",))
        assert "leaves nothing to convert; leave --exact out" in line


def test_layers_that_are_equal_are_one_line(deep: Path, tmp_path: Path) -> None:
    gmp, wrong = tmp_path / "gmp.safetensors", tmp_path / "wrong.safetensors"
    convert(deep, "gmp", gmp, "--exclude", "*.3.*")
    ran = done("verify", deep, gmp)
    checks = done("verify", deep, gmp, "--json").json["checks"]
    assert len(checks) == 12
    worst = max(checks, key=lambda check: check["max_rel"])
    assert worst["max_rel"] > 0
    assert ran.out.splitlines()[:3] == [
        "weights: passed",
        "  ok   1 layer equal bit for bit",
        f"  ok   11 layers equal within 2.0e-07 of their scale; worst {worst['max_rel']:.1e}: {worst['where']}",
    ]
    assert len(ran.out.splitlines()) == 7
    state = load_file(deep)
    for i in (1, 5):
        state[f"model.layers.{i}.self_attn.q_proj.weight"][0] *= 1.5
    ran = run("verify", saved(wrong, state), gmp)
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[2].startswith("  ok   9 layers equal within 2.0e-07 of their scale; worst ")
    assert [line.split("`")[1] for line in lines if line.startswith("  FAIL")] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (1, 5)
    ]
    assert lines[-1] == "FAILED: 2 of 12 checks"
