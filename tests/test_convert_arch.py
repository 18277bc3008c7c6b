"""``reparam convert --arch``: whole networks, through the command, in float64 where outputs are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arch_cases import X, inputs_file, loaded, write_arch, write_checkpoint
from graph_cases import EXACT, difference, noise, randomized
from safetensors.torch import save_file
from support import bits, done, raw_tensors, records_of, refused, snapshot, tensors_of
from torch import nn

from reparam.checkpoint import load_state_dict, save_state_dict
from reparam.errors import ArchitectureError
from reparam.graph import load_architecture, load_into


@pytest.fixture
def arch(tmp_path: Path) -> str:
    return write_arch(tmp_path)


@pytest.fixture
def model(arch: str) -> nn.Module:
    return randomized(load_architecture(arch))


@pytest.fixture
def source(arch: str, tmp_path: Path) -> Path:
    return write_checkpoint(arch, tmp_path)


COMBINATIONS = {
    "gmp": ["--to", "gmp"],
    "gmp inside": ["--to", "gmp", "--scale", "inside"],
    "wn": ["--to", "wn"],
    "wn mbn": ["--to", "wn", "--mean-norm"],
    "wn mbn calibrated": ["--to", "wn", "--fold-bn", "--mean-norm", "--calibrate", "INPUTS"],
    "gmp bn mn": ["--to", "gmp", "--fold-bn", "--mean-norm"],
    "gmp bn mn calibrated": ["--to", "gmp", "--fold-bn", "--mean-norm", "--calibrate", "INPUTS"],
    "unit": ["--to", "unit", "--fold-bn"],
    "sp bn": ["--to", "sp", "--fold-bn"],
}


@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_the_file_computes_what_the_original_computes(
    options: list[str], arch: str, model: nn.Module, source: Path, tmp_path: Path
) -> None:
    options = [str(inputs_file(tmp_path)) if option == "INPUTS" else option for option in options]
    before = source.read_bytes()
    report = done("convert", source, "--arch", arch, *options, "--json").json
    out = source.with_name(f"model.{options[1]}.safetensors")
    assert report["output"] == str(out)
    assert sorted(f.name for f in source.parent.iterdir()) == sorted([source.name, out.name])
    assert source.read_bytes() == before
    assert difference(loaded(out, arch), model, X) <= EXACT
    # and back, through the command again
    back = source.with_name("back.safetensors")
    if options[1] != "sp":
        ran = done("convert", out, "--arch", arch, "--to", "sp", "-o", back)
        gained = "a bias from mean normalization stays in conv1: the class alone cannot load this file strict"
        assert (gained in ran.out) == (options == COMBINATIONS["wn mbn"])
        assert difference(loaded(back, arch), model, X) <= EXACT
    plain = "--fold-bn" not in options and "--mean-norm" not in options
    if plain:
        found = load_architecture(arch).double()
        found.load_state_dict(tensors_of(back))
        assert difference(found.eval(), model, X) <= EXACT


def test_the_report(arch: str, source: Path) -> None:
    ran = done("convert", source, "--arch", arch, "--to", "gmp", "--fold-bn", "--mean-norm", "--json")
    assert ran.err == ""
    report = ran.json
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert {name: (layer["from"], layer["to"], layer["status"]) for name, layer in layers.items()} == {
        "conv1": ("sp", "gmp", "converted"),
        "conv2": ("sp", "gmp", "converted"),
        "fc1": ("sp", "gmp", "converted"),
        "fc2": ("sp", "sp", "skipped"),
    }
    assert layers["fc2"]["reason"] == "output layer"
    assert layers["conv1"]["reason"].startswith(
        "`bn1` folded in, gained a bias; Conv2d is GmPConv2d; after `pool`"
    )
    rules = {(rule["rule"], rule["layer"]): (rule["applied"], rule["why"]) for rule in report["rules"]}
    assert rules["fold batch norm", "conv2"] == (True, "`bn2` folded in")
    assert rules["place scale", "fc1"] == (True, "after `relu`")
    assert rules["place scale", "conv2"][0] is False
    assert rules["swap", "fc2"] == (False, "output layer")
    assert rules["mean normalization", "conv1"][0] is True
    assert report["rewritten"] is True
    # 5 filters of 3·3·3 weights, 5 of 5·3·3, 7 rows of 5
    assert (report["roundtrip"]["checked"], report["roundtrip"]["rows"]) == (
        5 * 27 + 5 * 45 + 7 * 5,
        5 + 5 + 7,
    )
    assert 0 < report["roundtrip"]["max_row_error"] <= 1e-12
    assert report["bytes_after"] == Path(report["output"]).stat().st_size


@pytest.mark.parametrize("to", ["gmp", "wn", "unit"])
def test_what_is_not_converted_stays_bit_for_bit(to: str, arch: str, tmp_path: Path) -> None:
    """In the dtypes of the file, bfloat16 beside float32."""
    state = {
        key: value.to(torch.bfloat16) if key.startswith(("conv", "fc")) else value.float()
        if value.is_floating_point() else value
        for key, value in randomized(load_architecture(arch)).state_dict().items()
    }  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    report = done("convert", tmp_path / "model.safetensors", "--arch", arch, "--to", to, "--json").json
    found = tensors_of(tmp_path / f"model.{to}.safetensors")
    kept = [key for key in state if key.startswith("bn")] + (
        [] if to == "unit" else ["fc2.weight", "fc2.bias"]
    )
    for key in kept:
        assert (found[key].dtype, bits(found[key])) == (state[key].dtype, bits(state[key])), key
    if to == "gmp":
        assert found["conv1.theta"].dtype == torch.float32
        assert records_of(tmp_path / "model.gmp.safetensors")["conv1.weight"]["dtype"] == "BF16"
    done(
        "convert",
        tmp_path / f"model.{to}.safetensors",
        "--arch",
        arch,
        "--to",
        "sp",
        "-o",
        tmp_path / "b.safetensors",
    )
    back = tensors_of(tmp_path / "b.safetensors")
    assert {key: value.dtype for key, value in back.items()} == {
        key: value.dtype for key, value in state.items()
    }
    inexact = sum(int((back[key] != state[key]).sum()) for key in state if key.endswith(".weight"))
    if to != "unit":
        assert inexact == report["roundtrip"]["inexact"] == 0


def test_folded_batch_norm_by_the_formula(arch: str, model: nn.Module, source: Path) -> None:
    out = done("convert", source, "--arch", arch, "--to", "sp", "--fold-bn").out
    assert "folded into 2 layers: the class alone cannot load this file strict" in out
    found, state = tensors_of(source.with_name("model.sp.safetensors")), model.state_dict()
    assert not [key for key in found if key.startswith("bn")]
    factor = state["bn1.weight"] / (state["bn1.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(
        found["conv1.weight"], state["conv1.weight"] * factor[:, None, None, None], rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        found["conv1.bias"], state["bn1.bias"] - state["bn1.running_mean"] * factor, rtol=1e-14, atol=1e-15
    )


def test_a_dry_run_writes_nothing(arch: str, source: Path) -> None:
    before = snapshot(source.parent)
    command = ["convert", source, "--arch", arch, "--to", "gmp", "--fold-bn", "--json"]
    planned = done(*command, "--dry-run").json
    assert snapshot(source.parent) == before
    assert planned["output"] is None
    report = done(*command).json
    for key in ("planned_output", "layers", "rules", "roundtrip"):
        assert planned[key] == report[key]
    assert planned["bytes_after"] <= report["bytes_after"]


def test_the_table_tells_alike_reasons_once(tmp_path: Path) -> None:
    ref = f"{Path(__file__).parent.parent / 'examples' / 'models' / 'cifar_resnet.py'}:resnet20"
    save_file(load_architecture(ref).state_dict(), tmp_path / "m.safetensors")
    out = done("convert", tmp_path / "m.safetensors", "--arch", ref, "--to", "gmp", "--fold-bn").out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (
        "fold batch norm applied 19 conv1, layer1.0.conv1, layer1.0.conv2 and 16 more `bn1` folded in, gained a bias, and so on"
        in lines
    )
    assert "swap applied 19 conv1, layer1.0.conv1, layer1.0.conv2 and 16 more Conv2d is GmPConv2d" in lines
    # what was done comes before what was not
    swaps = [line for line in lines if line.startswith("swap")]
    assert swaps[1:] == ["swap refused 1 linear output layer"]
    assert any(line.startswith("place scale refused 9 layer1.0.conv2") for line in lines)
    assert any("--scale inside keeps the class" in line for line in lines)
    assert any(line.startswith("converted 19 layers") for line in lines)
    assert len(lines) < 20


REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "fold without a network": (["--to", "gmp", "--fold-bn"], ("--fold-bn", "--arch")),
    "means without a network": (["--to", "gmp", "--mean-norm"], ("--mean-norm", "--arch")),
    "data without a network": (["--to", "gmp", "--calibrate", "x"], ("--calibrate", "--arch")),
    "a place without a network": (["--to", "gmp", "--scale", "inside"], ("--scale", "--arch")),
    "arguments of no network": (["--to", "gmp", "--arch-arg", "width=5"], ("--arch-arg", "--arch")),
    "a layout": (["--to", "wn", "--arch", "ARCH", "--layout", "clip-gmp"], ("--layout", "leave out --arch")),
    "exact": (["--to", "wn", "--arch", "ARCH", "--exact"], ("--exact", "leave out --arch")),
    "wide angles": (["--to", "gmp", "--arch", "ARCH", "--theta-dtype", "float64"], ("--theta-dtype",)),
    "an axis": (["--to", "gmp", "--arch", "ARCH", "--axis", "fc1=1"], ("--axis",)),
    "nothing to fold": (["--to", "sp", "--arch", "ARCH"], ("nothing to convert to sp",)),
    "some layers to sp": (["--to", "sp", "--arch", "ARCH", "--fold-bn", "--include", "conv1"], ("--include",)),
    "means of plain weights": (["--to", "sp", "--arch", "ARCH", "--fold-bn", "--mean-norm"], ("mean normalization",)),
    "a scale of wn": (["--to", "wn", "--arch", "ARCH", "--scale", "inside"], ("--scale inside", "wn")),
    "an unknown place": (["--to", "gmp", "--arch", "gone.py:net", "--scale", "above"], ("--scale above", "outside or inside")),
    "an unknown target": (["--to", "polar", "--arch", "gone.py:net"], ("polar", "sp, wn, gmp, unit")),
    "data for nothing": (["--to", "gmp", "--arch", "ARCH", "--calibrate", "x"], ("--calibrate", "--mean-norm")),
    "no such data": (["--to", "gmp", "--arch", "ARCH", "--mean-norm", "--calibrate", "none.npz"], ("none.npz",)),
    "an include for no layer": (["--to", "gmp", "--arch", "ARCH", "--include", "cnov"], ("--include cnov", "conv1")),
    "globs in one": (["--to", "gmp", "--arch", "ARCH", "--exclude", "conv1,fc1"], ("--exclude conv1,fc1", "each glob by itself")),
    "another function": (["--to", "gmp", "--arch", "ARCHx"], ("has no `netx`, but net, Net",)),
    "another width": (["--to", "gmp", "--arch", "ARCH", "--arch-arg", "width=6"], ("conv1.weight is [5, 3, 3, 3]",)),
    "a wrong argument": (["--to", "gmp", "--arch", "ARCH", "--arch-arg", "depth=6"], ("--arch", "depth")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "names"), REFUSED.values(), ids=REFUSED)
def test_options_that_do_not_fit(options: list[str], names: tuple[str, ...], arch: str, source: Path) -> None:
    options = [option.replace("ARCH", arch) for option in options]
    refused("convert", source, *options, naming=names, leaving=source.parent)


def test_outputs_are_kept(arch: str, source: Path) -> None:
    command = ["convert", source, "--arch", arch, "--to", "gmp"]
    done(*command)
    refused(*command, naming=("model.gmp.safetensors", "--force"), leaving=source.parent)
    done(*command, "--force", "--fold-bn")
    refused(*command, "-o", source, "--force", naming=("in place",), leaving=source.parent)
    refused(*command, "-o", source.parent / "x.pt", naming=("x.safetensors",), leaving=source.parent)


WRAPPED = {"DataParallel": "module.", "compile": "_orig_mod.", "both": "_orig_mod.module."}


@pytest.mark.parametrize("prefix", WRAPPED.values(), ids=WRAPPED)
def test_what_wrappers_leave_before_names_is_left_out(
    prefix: str, arch: str, model: nn.Module, tmp_path: Path
) -> None:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    out = done("convert", tmp_path / "m.safetensors", "--arch", arch, "--to", "gmp").out
    assert f"`{prefix}` stands before every name in the file" in out
    assert difference(loaded(tmp_path / "m.gmp.safetensors", arch), model, X) <= EXACT
    # records under such names too: a conversion of tensors alone keeps them
    done("convert", tmp_path / "m.safetensors", "--to", "gmp", "-o", tmp_path / "t.safetensors")
    assert f"{prefix}conv1.weight" in records_of(tmp_path / "t.safetensors")
    done(
        "convert", tmp_path / "t.safetensors", "--arch", arch, "--to", "sp", "-o", tmp_path / "b.safetensors"
    )
    assert difference(loaded(tmp_path / "b.safetensors", arch), model, X) <= EXACT


def test_records_of_a_wrapped_model(arch: str, model: nn.Module, source: Path) -> None:
    """A trainer may wrap what was converted: the batch norm that a record names is wrapped too."""
    done("convert", source, "--arch", arch, "--to", "gmp", "--fold-bn")
    tensors, records = load_state_dict(source.with_name("model.gmp.safetensors"))
    wrapped = {
        f"module.{k}": replace(r, batch_norm=r.batch_norm and f"module.{r.batch_norm}")
        for k, r in records.items()
    }
    file = source.with_name("wrapped.safetensors")
    save_state_dict({f"module.{key}": value for key, value in tensors.items()}, wrapped, file)
    done("convert", file, "--arch", arch, "--to", "sp")
    assert difference(loaded(source.with_name("wrapped.sp.safetensors"), arch), model, X) <= EXACT


def test_layers_left_alone_may_hold_anything(arch: str, model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    state["conv2.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "m.safetensors")
    command = ["convert", tmp_path / "m.safetensors", "--arch", arch, "--to", "gmp"]
    refused(*command, naming=("conv2", "NaN"), leaving=tmp_path)
    layers = done(*command, "--exclude", "conv2", "--json").json["layers"]
    assert {layer["name"]: layer["status"] for layer in layers}["conv2"] == "skipped"


def test_a_prefix_of_some_names_is_a_mismatch(arch: str, model: nn.Module, tmp_path: Path) -> None:
    state = {
        ("module." if key != "fc2.bias" else "") + key: value for key, value in model.state_dict().items()
    }
    save_file(state, tmp_path / "m.safetensors")
    line = refused(
        "convert", tmp_path / "m.safetensors", "--arch", arch, "--to", "gmp",
        naming=("does not fit Net", "missing from the file", "unknown to the architecture"), leaving=tmp_path,
    )  # fmt: skip
    assert "module.convN.weight (2)" in line
    assert "bnN.weight (2)" in line


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_one_name_of_a_shared_parameter_is_enough() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for key in ("embed.weight", "head.weight"):
        found = Tied()
        load_into(found, {key: weight}, "file")
        assert torch.equal(found.embed.weight, weight)
        assert found.head.weight is found.embed.weight
    with pytest.raises(ArchitectureError, match=r"embed.weight and head.weight differ in the file"):
        load_into(Tied(), {"embed.weight": weight, "head.weight": weight + 1}, "file")
    load_into(Tied(), {"embed.weight": weight, "head.weight": weight.clone()}, "file")


def test_a_shared_layer_stays_shared(tmp_path: Path) -> None:
    """One tensor in the file, also where the network is cast to the file's dtype."""
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n\ndef net():\n    a, b = nn.Linear(4, 4), nn.Linear(4, 4)\n    b.weight = a.weight\n"
        "    return nn.Sequential(a, nn.ReLU(), b, nn.Linear(4, 2))\n"
    )
    ref = f"{tmp_path / 'tied.py'}:net"
    model = randomized(load_architecture(ref))
    save_state_dict(model.state_dict(), {}, tmp_path / "m.safetensors")
    done("convert", tmp_path / "m.safetensors", "--arch", ref, "--to", "gmp")
    assert len([key for key in raw_tensors(tmp_path / "m.gmp.safetensors") if key.endswith("theta")]) == 1
    assert difference(loaded(tmp_path / "m.gmp.safetensors", ref), model, noise(5, 4)) <= EXACT
