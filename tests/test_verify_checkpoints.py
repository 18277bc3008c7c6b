"""Checkpoint against checkpoint, `reparam.pipeline.verify`, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from support import convert, refused, run
from torch import Tensor, nn

from reparam import pipeline
from reparam.errors import ReparamError
from reparam.graph import InputSpec
from reparam.graph import convert as convert_module
from reparam.verification import verify_checkpoints, verify_models

KEYS = {
    "conv.weight": (6, 3, 3, 3),
    "conv.bias": (6,),
    "fc.weight": (4, 6),
    "fc.bias": (4,),
    "norm.scale": (6,),
}


def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in KEYS.items()}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_file(state(), tmp_path / "sp.safetensors")
    return tmp_path / "sp.safetensors"


def changed(path: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with other values; a reparameterized file keeps its records."""
    from safetensors import safe_open

    values = load_file(path)
    change(values)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(values, to, metadata)
    return to


def failing(reference: Path, candidate: Path) -> list[str]:
    report = verify_checkpoints(reference, candidate)
    assert report.passed == (not report.failures)
    return [str(check.where).split("`")[1] for check in report.failures]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gmp", "wn"])
def test_conversions_there_and_back_pass(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("sp", kind, "back", "gmp2")]
    save_file(state(dtype), paths[0])
    convert(paths[0], kind, paths[1])
    convert(paths[1], "sp", paths[2])
    convert(paths[0], "gmp", paths[3])
    for candidate in (paths[0], paths[1], paths[3]):
        assert failing(paths[0], candidate) == []
        assert failing(paths[1], candidate) == []
    assert failing(paths[1], paths[2]) == []


@pytest.mark.parametrize("key", KEYS)
def test_one_bit_of_a_plain_copy_fails(key: str, plain: Path, tmp_path: Path) -> None:
    def flip(values: dict[str, Tensor]) -> None:
        values[key].view(torch.int32).view(-1)[0] ^= 1

    assert failing(plain, changed(plain, tmp_path / "c.safetensors", flip)) == [key.replace("bias", "weight")]


@pytest.mark.parametrize("kind", ["gmp", "wn"])
def test_a_turned_row_fails(kind: str, plain: Path, tmp_path: Path) -> None:
    converted = tmp_path / "c.safetensors"
    convert(plain, kind, converted)
    name = {"gmp": "conv.theta", "wn": "conv.weight_v"}[kind]

    def turn(values: dict[str, Tensor]) -> None:
        values[name].view(len(values[name]), -1)[2, 1] += 1e-5

    report = verify_checkpoints(plain, changed(converted, tmp_path / "d.safetensors", turn))
    assert [check.where.split("`")[1] for check in report.failures if check.where] == ["conv.weight"]
    check = report.failures[0]
    assert check.max_rel is not None
    assert 1e-7 < check.max_rel < 1e-4
    assert check.tolerance == 2e-7
    assert report.diverges == "conv.weight"


@pytest.mark.parametrize("name", ["fc.lambda_", "fc.r"])
def test_a_wrong_bias_or_scale_fails(name: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, "gmp", tmp_path / "c.safetensors", "--include", "*")
    wrong = changed(tmp_path / "c.safetensors", tmp_path / "d.safetensors", lambda v: v[name].mul_(1 + 2e-6))
    assert failing(plain, wrong) == ["fc.weight"]


def test_types_that_differ_are_compared_in_the_coarser(plain: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in load_file(plain).items()}, half)
    assert failing(plain, half) == []
    assert failing(half, plain) == []
    off = changed(half, tmp_path / "off.safetensors", lambda v: v["fc.weight"].view(-1)[3:4].mul_(1.002))
    assert failing(plain, off) == ["fc.weight"]


def test_missing_extra_and_misshapen(plain: Path, tmp_path: Path) -> None:
    less = changed(plain, tmp_path / "less.safetensors", lambda v: v.pop("norm.scale"))
    assert failing(plain, less) == ["norm.scale"]
    assert failing(less, plain) == ["norm.scale"]
    lost = changed(plain, tmp_path / "lost.safetensors", lambda v: (v.pop("fc.weight"), v.pop("fc.bias")))
    assert set(failing(plain, lost)) == {"fc.weight", "fc.bias"}
    other = changed(plain, tmp_path / "o.safetensors", lambda v: v.update({"fc.weight": torch.zeros(4, 7)}))
    assert failing(plain, other) == ["fc.weight"]
    bare = changed(plain, tmp_path / "bare.safetensors", lambda v: v.pop("fc.bias"))
    assert "fc.weight" in failing(plain, bare)


def test_a_nan_is_not_equal_to_itself(plain: Path, tmp_path: Path) -> None:
    nan = changed(plain, tmp_path / "nan.safetensors", lambda v: v["fc.weight"].view(-1)[:1].fill_(torch.nan))
    assert failing(nan, nan) == ["fc.weight"]


def test_the_command_compares_checkpoints(plain: Path, tmp_path: Path) -> None:
    convert(plain, "gmp", tmp_path / "c.safetensors")
    ran = run("verify", plain, tmp_path / "c.safetensors")
    assert (ran.code, ran.err) == (0, "")
    assert "conv.weight" in ran.out
    assert ran.out.rstrip().endswith("passed")
    wrong = changed(plain, tmp_path / "d.safetensors", lambda v: v["conv.weight"].mul_(1.1))
    ran = run("verify", plain, wrong, "--json")
    value = json.loads(ran.out)
    assert (ran.code, ran.err, value["passed"], value["diverges"]) == (1, "", False, "conv.weight")
    assert value["proofs"] == {"weights": False, "algebra": None, "deployment": None}


ARCH = """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with arch.py, gmp.safetensors and its m.onnx."""
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "arch.py").write_text(ARCH)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    save_file(model.state_dict(), folder / "sp.safetensors")
    convert(folder / "sp.safetensors", "gmp", folder / "gmp.safetensors")
    arch = f"{folder / 'arch.py'}:net"
    pipeline.export_onnx(folder / "gmp.safetensors", arch, [InputSpec("input", ("N", 5))], folder / "m.onnx")
    return folder


def test_the_command_proves_an_onnx_file(deployed: Path, tmp_path: Path) -> None:
    arch = ("--arch", f"{deployed / 'arch.py'}:net", "--input", "N,5")
    ran = run("verify", deployed / "gmp.safetensors", deployed / "m.onnx", *arch)
    assert (ran.code, ran.err) == (0, ""), ran
    for proof in ("weights", "algebra", "deployment"):
        assert f"{proof}: passed" in ran.out
    model = onnx.load(deployed / "m.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "2.weight")
    value = numpy_helper.to_array(tensor).copy()
    value[0, 0] *= 1.5
    tensor.CopyFrom(numpy_helper.from_array(value, "2.weight"))
    onnx.save(model, tmp_path / "w.onnx")
    ran = run("verify", deployed / "gmp.safetensors", tmp_path / "w.onnx", *arch, "--json")
    value = json.loads(ran.out)
    assert (ran.code, value["diverges"]) == (1, "2.weight")
    assert value["proofs"] == {"weights": False, "algebra": True, "deployment": False}
    np.save(tmp_path / "d.npy", np.ones((3, 5), np.float32))
    ran = run("verify", deployed / "gmp.safetensors", tmp_path / "w.onnx", *arch, "--data", tmp_path / "d.npy",
              "--atol", "100")  # fmt: skip
    assert "ok   within rtol and atol" in ran.out
    assert ran.code == 1  # its weights are wrong still


def test_usage_that_cannot_be_meant_is_refused(deployed: Path) -> None:
    gmp, file = deployed / "gmp.safetensors", deployed / "m.onnx"
    arch = ("--arch", f"{deployed / 'arch.py'}:net")
    assert "give --arch" in refused("verify", gmp, file, "--input", "N,5")
    assert "--input is missing" in refused("verify", gmp, file, *arch)
    assert "comes second" in refused("verify", file, gmp)
    assert "without --arch" in refused("verify", gmp, gmp, "--input", "N,5")
    refused("verify", gmp, deployed / "none.onnx", *arch, "--input", "N,5", naming=("none.onnx",))
    refused("verify", gmp, deployed / "none.safetensors", naming=("none.safetensors",))
    refused("verify", gmp, file, *arch, "--input", "N,5", "--data", deployed / "arch.py")


def test_modules_against_modules_and_files(deployed: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    other = convert_module(model, "gmp", include=["*"])
    assert (
        pipeline.verify(model, other, ["N,5"]).passed is False
    )  # r, theta are float32: not the same to 1e-12
    exact = convert_module(model.double(), "gmp", include=["*"])
    assert pipeline.verify(model, exact, ["N,5"]).passed
    report = pipeline.verify(model.float(), deployed / "m.onnx", ["N,5"])
    # The file was made from angles: its weights are those of the model but for the last bit.
    assert all(check.passed for check in report.proof("deployment"))
    with pytest.raises(ReparamError, match="compared with an ONNX file or a module"):
        pipeline.verify(model, deployed / "gmp.safetensors")
    changed_model = convert_module(model.double(), "gmp", include=["*"])
    with torch.no_grad():
        changed_model.get_submodule("0").r[0] *= 1 + 1e-10
    report = verify_models(model, changed_model, [InputSpec("x", ("N", 5))])
    assert [check.name for check in report.failures] == ["models"]
