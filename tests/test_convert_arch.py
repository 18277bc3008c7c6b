"""``reparam convert --arch``: whole networks, through the command, in float64 where outputs are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from safetensors.torch import save_file
from support import bits, done, raw_tensors, records_of, refused, run, snapshot, tensors_of
from torch import Tensor, nn

import reparam.demo.model as demo_model
import reparam.graph
from reparam.checkpoint import load_state_dict, save_state_dict
from reparam.errors import ArchitectureError, CheckFailedError
from reparam.graph import apply_records, load_architecture, load_into
from reparam.graph.comparing import compare_layers
from reparam.graph.rewritten import Rewritten
from reparam.pipeline.loading import load_network

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc1 = nn.Linear(width, 7)
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


def net(width: int = 5):
    return Net(width)
"""
X = noise(3, 3, 6, 6)
BUNDLED = Path(demo_model.__file__).parent / "data"
DEMO = "reparam.demo.model:small_cnn"


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:net"


@pytest.fixture
def model(arch: str) -> nn.Module:
    return randomized(load_architecture(arch))


@pytest.fixture
def source(model: nn.Module, tmp_path: Path) -> Path:
    """Its file, in a folder of its own."""
    (tmp_path / "in").mkdir()
    save_file(model.state_dict(), tmp_path / "in" / "model.safetensors")
    return tmp_path / "in" / "model.safetensors"


def inputs_file(folder: Path, x: Tensor = X) -> Path:
    save_file({"x": x}, folder / "inputs.safetensors")
    return folder / "inputs.safetensors"


def loaded(file: Path, arch: str) -> nn.Module:
    """What the file holds, put into its network by hand, in float64."""
    tensors, records = load_state_dict(file)
    plain = load_architecture(arch).double()
    if "conv1.bias" in tensors and "conv1.weight" not in records:  # a mean that was folded left it
        plain.conv1.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    found = apply_records(plain, records)
    load_into(found, tensors, str(file))
    return found.eval()


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
        assert ("cannot load strict: conv1" in ran.out) == (options == COMBINATIONS["wn mbn"])
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
    "an unknown place": (["--to", "gmp", "--arch", "ARCH", "--scale", "above"], ("above", "outside or inside")),
    "an unknown target": (["--to", "polar", "--arch", "ARCH"], ("polar",)),
    "data for nothing": (["--to", "gmp", "--arch", "ARCH", "--calibrate", "x"], ("--calibrate", "--mean-norm")),
    "no such data": (["--to", "gmp", "--arch", "ARCH", "--mean-norm", "--calibrate", "none.npz"], ("none.npz",)),
    "an include for no layer": (["--to", "gmp", "--arch", "ARCH", "--include", "cnov"], ("include cnov", "conv1")),
    "another width": (["--to", "gmp", "--arch", "ARCH", "--arch-arg", "width=6"], ("conv1.weight is [5, 3, 3, 3]",)),
    "a wrong argument": (["--to", "gmp", "--arch", "ARCH", "--arch-arg", "depth=6"], ("--arch", "depth")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "names"), REFUSED.values(), ids=REFUSED)
def test_options_that_do_not_fit(options: list[str], names: tuple[str, ...], arch: str, source: Path) -> None:
    options = [arch if option == "ARCH" else option for option in options]
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


# --- calibration


def write_npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "inputs.npz", **arrays)
    return folder / "inputs.npz"


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_calibration_takes_the_mean_of_all_inputs(kind: str, arch: str, source: Path, tmp_path: Path) -> None:
    """More than one batch of 256, the last one shorter; of conv1 the mean is that of the inputs."""
    x = noise(300, 3, 2, 2, seed=5)
    data = inputs_file(tmp_path, x) if kind == "safetensors" else write_npz(tmp_path, x=x.numpy())
    report = done(
        "convert", source, "--arch", arch, "--to", "gmp", "--mean-norm", "--calibrate", data, "--json"
    ).json
    assert {r["why"] for r in report["rules"] if r["rule"] == "calibrate"} == {"mean set from 2 batches"}
    found = tensors_of(source.with_name("model.gmp.safetensors"))["conv1.running_input_mean"]
    torch.testing.assert_close(found, x.mean((0, 2, 3)), rtol=0, atol=1e-14)


DATA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "two arrays": ({"x": np.zeros((2, 3, 6, 6)), "y": np.zeros(2)}, ("x, y", "one array")),
    "none": ({}, ("nothing", "one array")),
    "bytes": ({"x": np.zeros((2, 3, 6, 6), np.uint8)}, ("uint8", "float")),
    "booleans": ({"x": np.zeros((2, 3, 6, 6), bool)}, ("bool",)),
    "text": ({"x": np.array(["a"])}, ("cannot be read",)),
    "objects": ({"x": np.array([{}])}, ("cannot be read",)),
    "a number": ({"x": np.float64(1)}, ("(N, ...)",)),
    "no inputs": ({"x": np.zeros((0, 3, 6, 6))}, ("(N, ...)",)),
    "another number of channels": ({"x": np.zeros((2, 4, 6, 6))}, ("does not take inputs of [4, 6, 6]",)),
    "no images": ({"x": np.zeros((2, 3))}, ("does not take inputs of [3]",)),
    "NaN": ({"x": np.full((2, 3, 6, 6), np.nan)}, ("NaN",)),
}


@pytest.mark.parametrize(("arrays", "names"), DATA.values(), ids=DATA)
def test_data_that_do_not_fit(
    arrays: dict[str, Any], names: tuple[str, ...], arch: str, source: Path, tmp_path: Path
) -> None:
    data = write_npz(tmp_path, **arrays)
    command = ["convert", source, "--arch", arch, "--to", "gmp", "--mean-norm", "--calibrate", data]
    refused(*command, naming=names, leaving=source.parent)


def test_data_of_other_kinds(arch: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "bad.csv").write_text("1,2\n")
    for name in ("bad.npz", "bad.safetensors", "bad.csv", "gone.npz", "gone.safetensors"):
        command = [
            "convert",
            source,
            "--arch",
            arch,
            "--to",
            "gmp",
            "--mean-norm",
            "--calibrate",
            tmp_path / name,
        ]
        refused(*command, naming=(name,), leaving=source.parent)


# --- the check of what was made


def wrong(model: nn.Module, change: str) -> None:
    with torch.no_grad():
        if change == "theta":
            model.conv2.theta[1, 3] += 1e-9
        elif change == "r":
            model.conv1.r[0] *= 1 + 1e-10
        elif change == "lambda_":
            model.fc1.lambda_[2] += 1e-9
        elif change == "weight_v":
            model.fc1.weight_v[:, 1] *= 1 + 1e-10
        elif change == "bias":
            model.fc1.bias[2] *= 1 + 1e-9
        else:
            model.get_parameter(change)[0] *= 1 + 1e-10


WRONG = [
    ("gmp", "theta"),
    ("gmp", "r"),
    ("gmp", "lambda_"),
    ("unit", "weight_v"),
    ("unit", "bias"),
    ("unit", "fc2.weight"),
    ("unit", "fc2.bias"),
    ("unit", "conv1.bias"),
    ("gmp", "fc2.weight"),
]


@pytest.mark.parametrize(("to", "change"), WRONG)
def test_a_wrong_conversion_is_found_and_nothing_written(
    to: str, change: str, arch: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reparam.graph.convert

    def convert(*args: Any, **options: Any) -> nn.Module:
        model = right(*args, **options)
        wrong(model, change)
        return model

    before = snapshot(source.parent)
    monkeypatch.setattr(reparam.graph, "convert", convert)
    ran = run("convert", source, "--arch", arch, "--to", to, "--fold-bn")
    assert (ran.code, ran.out) == (1, "")
    assert "nothing was written" in ran.err
    assert snapshot(source.parent) == before


def test_a_lost_zero_is_found() -> None:
    plain = nn.Linear(3, 2)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [1.0, 2.0, 3.0]]))
    model = reparam.graph.convert(nn.Sequential(plain, nn.ReLU(), nn.Linear(2, 2)), "wn")
    with torch.no_grad():
        model[0].weight_v[0, 1] = 1e-30
    with pytest.raises(CheckFailedError, match=r"'0.weight' lost an exact zero"):
        compare_layers(nn.Sequential(plain, nn.ReLU(), nn.Linear(2, 2)), model)


# --- from the file on: fine-tuning, exporting, going back


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo network: batch norms folded, means normalized and calibrated on real images, trained a little."""
    folder = tmp_path_factory.mktemp("demo")
    command = ["--arch", DEMO, "--to", "gmp", "--fold-bn", "--mean-norm", "--calibrate", BUNDLED]
    done("convert", BUNDLED / "small_cnn.safetensors", *command, "-o", folder / "cnn.gmp.safetensors")
    data = ["--data", BUNDLED, "--steps", 2, "--batch-size", 32]
    ran = done(
        "finetune", folder / "cnn.gmp.safetensors", "--arch", DEMO, *data, "-o", folder / "run", "--json"
    )
    before = done(
        "finetune", BUNDLED / "small_cnn.safetensors", "--arch", DEMO, *data, "-o", folder / "p", "--json"
    )
    # the conversion changed no prediction
    assert ran.json["accuracy_before"] == before.json["accuracy_before"]
    return folder / "run" / "model.safetensors"


def test_fine_tuning_trains_and_keeps_the_records(fine_tuned: Path) -> None:
    source = fine_tuned.parent.parent / "cnn.gmp.safetensors"
    assert records_of(fine_tuned) == records_of(source)
    record = records_of(fine_tuned)["conv1.weight"]
    assert (record["scale"], record["mean"], record["batch_norm"]) == ("outside", "mn", "bn1")
    before, after = tensors_of(source), tensors_of(fine_tuned)
    assert {key: value.dtype for key, value in after.items()} == {k: v.dtype for k, v in before.items()}
    for key in ("conv1.r", "conv2.theta", "conv3.lambda_", "conv2.running_input_mean", "head.weight"):
        assert not torch.equal(before[key], after[key]), key


def negative(file: Path, out: Path) -> nn.Module:
    """The file with some r of conv1 and conv3 negative, as training may make them; the network that holds it."""
    tensors, records = load_state_dict(file)
    for key in ("conv1.r", "conv3.r"):
        tensors[key][::3] *= -1
    save_state_dict(tensors, records, out)
    return load_network(out, DEMO, None).model.eval()


def test_negative_scales_are_exported(fine_tuned: Path, tmp_path: Path) -> None:
    """conv1's signs go past its max-pool, where the scale stands, into conv2; conv3's past the average into the head."""
    model = negative(fine_tuned, tmp_path / "n.safetensors")
    assert isinstance(model, Rewritten)
    ran = done(
        "export", tmp_path / "n.safetensors", "--arch", DEMO, "--input", "N,1,28,28", "--onnx", tmp_path / "n.onnx", "--json",
    )  # fmt: skip
    assert ran.json["passed"] is True
    assert "Mul" not in {node.op_type for node in onnx.load(tmp_path / "n.onnx").graph.node}


def test_and_go_back_to_plain_weights(fine_tuned: Path, tmp_path: Path) -> None:
    model = negative(fine_tuned, tmp_path / "n.safetensors").double()
    refused(
        "convert", tmp_path / "n.safetensors", "--to", "sp", naming=("network", "--arch"), leaving=tmp_path
    )
    done(
        "convert", tmp_path / "n.safetensors", "--to", "sp", "--arch", DEMO, "-o", tmp_path / "sp.safetensors"
    )
    plain = load_network(tmp_path / "sp.safetensors", DEMO, None).model.eval().double()
    assert type(plain) is demo_model.SmallCNN
    # both rounded to float32: of the weights once more
    assert difference(plain, model, noise(2, 1, 28, 28)) <= 2e-6


def test_a_sign_no_file_can_hold_is_refused(arch: str, source: Path, tmp_path: Path) -> None:
    """A residual addition takes what conv1 computes as well: its signs need a multiplication."""
    done("convert", source, "--arch", arch, "--to", "gmp", "--fold-bn", "-o", tmp_path / "g.safetensors")
    tensors, records = load_state_dict(tmp_path / "g.safetensors")
    tensors["conv1.r"][1] *= -1
    save_state_dict(tensors, records, tmp_path / "n.safetensors")
    refused(
        "convert", tmp_path / "n.safetensors", "--arch", arch, "--to", "sp",
        naming=("multiplication", "export"), leaving=tmp_path,
    )  # fmt: skip
    ran = done(
        "export",
        tmp_path / "n.safetensors",
        "--arch",
        arch,
        "--input",
        "N,3,6,6",
        "--onnx",
        tmp_path / "n.onnx",
    )
    assert "ok" in ran.out


def test_fine_tuning_a_file_of_old_torch(tmp_path: Path) -> None:
    """Without batch norm's counters, and wrapped."""
    tensors, _ = load_state_dict(BUNDLED / "small_cnn.safetensors")
    state = {
        f"module.{key}": value for key, value in tensors.items() if not key.endswith("num_batches_tracked")
    }
    save_file(state, tmp_path / "old.safetensors")
    ran = done(
        "finetune", tmp_path / "old.safetensors", "--arch", DEMO, "--data", BUNDLED, "--steps", 1, "-o", tmp_path / "run",
        "--json",
    )  # fmt: skip
    assert "`module.` stands before every name" in ran.err
    assert json.loads(ran.out)["steps"] == 1
    assert "conv1.weight" in tensors_of(tmp_path / "run" / "model.safetensors")
