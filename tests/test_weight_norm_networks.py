"""Weight normalization in its network: files of every ``--layout``, and those that torch wrote without a record."""

from __future__ import annotations

from pathlib import Path

import oracles
import pytest
import torch
from arch_cases import loaded
from graph_cases import difference, noise
from safetensors.torch import load_file, save_file
from support import convert, done, refused
from torch import Tensor, nn
from torch_weight_norm import FLAVOURS, TORCH_FLOAT32, Flavour, ulps

from reparam.graph import load_architecture
from reparam.pipeline.loading import load_network

NET = """
import warnings
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.Flatten(), nn.Linear(125, 6), nn.ReLU(),
        nn.Linear(6, 2),
    )

def normalized():
    made = net()
    torch.nn.utils.parametrizations.weight_norm(made[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(made[4])
    return made
"""
X = noise(2, 3, 6, 6)
WEIGHTS = ("0", "2", "4", "6")
flavours = pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:net"


def original(arch: str) -> nn.Sequential:
    torch.manual_seed(0)
    made = load_architecture(arch)
    assert isinstance(made, nn.Sequential)
    return made


def written_by_torch(
    arch: str, flavour: Flavour, path: Path, dim: int = 0, prefix: str = ""
) -> dict[str, Tensor]:
    """A checkpoint of weight-normalized layers whose ‖v‖ is not g; the plain state_dict by torch's own removal in float64."""
    net = original(arch)
    for i in (0, 2, 4):
        flavour.wrap(net[i], dim=dim)
    with torch.no_grad():
        for key, value in net.state_dict(keep_vars=True).items():
            value.mul_(torch.rand(value.shape, generator=torch.Generator().manual_seed(len(key))) + 0.5)
    save_file({prefix + key: value for key, value in net.state_dict().items()}, path)
    net.double()
    for i in (0, 2, 4):
        flavour.remove(net[i])
    return {key: value.float() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("layout", ["parametrizations", "clip-gmp"])
def test_the_names_of_a_layout_are_read_into_layers(layout: str, arch: str, tmp_path: Path) -> None:
    net = original(arch)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    out = tmp_path / "wn.safetensors"
    convert(tmp_path / "model.safetensors", "wn", out, "--layout", layout)
    names = load_file(out).keys()
    assert "4.weight_g" not in names
    found = loaded(out, arch)
    assert {f"{i}.weight_g" for i in WEIGHTS if f"{i}.weight" not in names} <= found.state_dict().keys()
    assert difference(found, original(arch).double(), X) <= oracles.FLOAT32_ROW
    again = convert(out, "sp", tmp_path / "sp.safetensors", "--arch", arch)
    assert {layer["from"] for layer in again["layers"] if f"{layer['name']}.weight" not in names} == {"wn"}
    plain = load_file(tmp_path / "sp.safetensors")
    for i in WEIGHTS:
        oracles.assert_came_back(plain[f"{i}.weight"], net.state_dict()[f"{i}.weight"], torch.float32)


def test_a_layout_is_exported(arch: str, tmp_path: Path) -> None:
    save_file(original(arch).state_dict(), tmp_path / "model.safetensors")
    out = tmp_path / "wn.safetensors"
    convert(tmp_path / "model.safetensors", "wn", out, "--layout", "parametrizations")
    done("export", out, "--arch", arch, "--input", "N,3,6,6", "--onnx", tmp_path / "model.onnx")


@flavours
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_torch_wrote_needs_no_record(prefix: str, flavour: Flavour, arch: str, tmp_path: Path) -> None:
    source = tmp_path / "torch.safetensors"
    expected = written_by_torch(arch, flavour, source, prefix=prefix)
    convert(source, "sp", tmp_path / "sp.safetensors", "--arch", arch)
    found = load_file(tmp_path / "sp.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert ulps(found[key], value) <= 1, key


def test_what_torch_wrote_is_analyzed_as_weight_norm(arch: str, tmp_path: Path) -> None:
    source = tmp_path / "torch.safetensors"
    written_by_torch(arch, FLAVOURS["new"], source, prefix="module.")
    layers = done("analyze", source, "--arch", arch, "--json").json["models"][0]["layers"]
    assert {layer["name"]: layer["held"] for layer in layers} == {"0": "wn", "2": "wn", "4": "wn", "6": "sp"}


@flavours
def test_what_convert_leaves_as_torch_wrote_it_does_too(flavour: Flavour, arch: str, tmp_path: Path) -> None:
    """The head alone is converted; the other layers keep their bytes."""
    source, out = tmp_path / "torch.safetensors", tmp_path / "wn.safetensors"
    expected = written_by_torch(arch, flavour, source)
    convert(source, "wn", out, "--layout", flavour.layout)
    convert(out, "sp", tmp_path / "sp.safetensors", "--arch", arch)
    found = load_file(tmp_path / "sp.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=TORCH_FLOAT32, atol=0)


def test_norms_over_other_axes_are_refused_with_the_mend(arch: str, tmp_path: Path) -> None:
    source = tmp_path / "torch.safetensors"
    expected = written_by_torch(arch, FLAVOURS["old"], source, dim=1)
    refused(
        "convert", source, "--to", "sp", "--arch", arch,
        naming=("does not fit Sequential", "`reparam convert` it --to sp first"), leaving=tmp_path,
    )  # fmt: skip
    convert(source, "sp", tmp_path / "sp.safetensors")
    assert load_network(tmp_path / "sp.safetensors", arch, None).model.state_dict().keys() == expected.keys()


def test_an_architecture_that_normalizes_itself_is_left_alone(arch: str, tmp_path: Path) -> None:
    own = arch.replace(":net", ":normalized")
    torch.manual_seed(1)
    net = load_architecture(own)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    found = load_network(tmp_path / "model.safetensors", own, None).model
    assert [type(m).__name__ for m in found.modules()] == [type(m).__name__ for m in net.modules()]
    assert difference(found, net, X.float()) == 0
