"""Weight normalization as torch has it, old and new: files go both ways, torch's own code is the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import assert_same_bits, bits, convert, done, gaussian, raw_tensors, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

#: torch composes g·(v/‖v‖) in float32, the norm of up to 200 numbers too
TORCH_FLOAT32 = 3e-7


def wrap_old(module: nn.Module, name: str = "weight", dim: int | None = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, name, dim)


def remove_old(module: nn.Module, name: str = "weight") -> None:
    torch.nn.utils.remove_weight_norm(module, name)


def wrap_new(module: nn.Module, name: str = "weight", dim: int | None = 0) -> None:
    parametrizations.weight_norm(module, name, dim)


def remove_new(module: nn.Module, name: str = "weight") -> None:
    parametrize.remove_parametrizations(module, name)


@dataclass(frozen=True)
class Flavour:
    """One of torch's two weight norms."""

    layout: str
    wrap: Callable[..., None]
    remove: Callable[..., None]
    g: str
    v: str


FLAVOURS = {
    "old": Flavour("weight_norm", wrap_old, remove_old, "weight_g", "weight_v"),
    "new": Flavour(
        "parametrizations", wrap_new, remove_new, "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ),
}  # fmt: skip
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(40, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv transpose 1d": lambda: nn.ConvTranspose1d(6, 4, 7),
    "conv transpose 1d, square": lambda: nn.ConvTranspose1d(6, 6, 7),
}
DIMS = {
    "linear": 0,
    "conv1d": 0,
    "conv2d": 0,
    "conv transpose 1d": 0,
    "conv transpose 1d, dim 1": 1,
    "conv1d, dim 2": 2,
    "conv1d, dim None": None,
    "linear, dim None": None,
    "linear, dim 1": 1,
}
flavours = pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)


State = Mapping[str, Tensor]


class Net(nn.Module):
    """One layer under a name, as it stands in a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def a_net(make: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(make())


def trained(make: Callable[[], nn.Module], flavour: Flavour, dim: int | None) -> Net:
    """Weight-normalized, and trained: ‖v‖ is not g."""
    net = a_net(make)
    flavour.wrap(net.layer, dim=dim)
    with torch.no_grad():
        for key, value in net.layer.state_dict(keep_vars=True).items():
            value.mul_(torch.rand(value.shape, generator=torch.Generator().manual_seed(len(key))) + 0.5)
    return net


def ulps(found: Tensor, expected: Tensor) -> float:
    """Largest distance in units of the last place of ``expected``."""
    spacing = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
    return float(((found.double() - expected.double()).abs() / spacing.double()).max())


def removed_in_float64(
    make: Callable[[], nn.Module], flavour: Flavour, dim: int | None, state: State
) -> Tensor:
    """The weight torch's own removal leaves of a state_dict, computed in float64 and rounded once."""
    net = a_net(make)
    flavour.wrap(net.layer, dim=dim)
    net.load_state_dict(state, strict=True)
    net.double()
    flavour.remove(net.layer)
    return net.state_dict()["layer.weight"].float()


@flavours
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_files_load_strict_into_torch(
    make: Callable[[], nn.Module], flavour: Flavour, tmp_path: Path
) -> None:
    net = a_net(make)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    out = tmp_path / "wn.safetensors"
    convert(tmp_path / "model.safetensors", "wn", out, "--layout", flavour.layout)
    normalized = a_net(make)
    flavour.wrap(normalized.layer)
    with torch.no_grad():
        for value in normalized.state_dict(keep_vars=True).values():
            value.zero_()
    normalized.load_state_dict(load_file(out), strict=True)
    flavour.remove(normalized.layer)
    expected = net.state_dict()
    assert list(normalized.state_dict()) != []
    for key, value in normalized.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=TORCH_FLOAT32, atol=0)
    assert torch.equal(normalized.layer.bias, net.layer.bias)


@flavours
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", DIMS)
def test_what_torch_saved_folds_to_torchs_own_removal(
    name: str, suffix: str, flavour: Flavour, tmp_path: Path
) -> None:
    make = MODULES[name.split(", dim")[0]]
    net = trained(make, flavour, DIMS[name])
    source = tmp_path / f"model{suffix}"
    (torch.save if suffix == ".pt" else save_file)(net.state_dict(), source)
    convert(source, "sp", tmp_path / "sp.safetensors")
    found = load_file(tmp_path / "sp.safetensors")
    exact = removed_in_float64(make, flavour, DIMS[name], net.state_dict())
    flavour.remove(net.layer)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert ulps(found["layer.weight"], exact) <= 1
    torch.testing.assert_close(found["layer.weight"], net.layer.weight, rtol=TORCH_FLOAT32, atol=0)
    assert torch.equal(found["layer.bias"], net.layer.bias)
    net.load_state_dict(found, strict=True)


@flavours
@pytest.mark.parametrize("name", DIMS)
def test_any_dim_becomes_torchs_default(name: str, flavour: Flavour, tmp_path: Path) -> None:
    """Names of the other dialect for one norm a row; a new decomposition for every other dim."""
    make = MODULES[name.split(", dim")[0]]
    net = trained(make, flavour, DIMS[name])
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    other = next(f for f in FLAVOURS.values() if f is not flavour)
    convert(tmp_path / "model.safetensors", "wn", tmp_path / "wn.safetensors", "--layout", other.layout)
    again = removed_in_float64(make, other, 0, load_file(tmp_path / "wn.safetensors"))
    expected = removed_in_float64(make, flavour, DIMS[name], net.state_dict())
    assert float(oracles.row_errors(again.flatten(1), expected.flatten(1)).max()) <= oracles.FLOAT32_ROW


@pytest.mark.parametrize("name", [name for name, dim in DIMS.items() if dim == 0])
def test_names_of_another_layout_keep_every_byte(name: str, tmp_path: Path) -> None:
    net = trained(MODULES[name], FLAVOURS["old"], 0)
    save_file(net.state_dict(), tmp_path / "old.safetensors")
    report = convert(
        tmp_path / "old.safetensors", "wn", tmp_path / "new.safetensors", "--layout", "parametrizations"
    )
    assert report["roundtrip"]["checked"] == 0
    convert(tmp_path / "new.safetensors", "wn", tmp_path / "back.safetensors", "--layout", "weight_norm")
    assert_same_bits(load_file(tmp_path / "back.safetensors"), net.state_dict())
    new, state = raw_tensors(tmp_path / "new.safetensors"), net.state_dict()
    assert new["layer.parametrizations.weight.original0"][2] == bits(state["layer.weight_g"])
    assert new["layer.parametrizations.weight.original1"][2] == bits(state["layer.weight_v"])
    if name == "linear":
        clip = tmp_path / "clip.safetensors"
        convert(tmp_path / "old.safetensors", "wn", clip, "--layout", "clip-gmp")
        convert(clip, "wn", tmp_path / "from_clip.safetensors", "--layout", "parametrizations")
        assert raw_tensors(tmp_path / "from_clip.safetensors") == new


def clip_state() -> dict[str, Tensor]:
    """A layer as CLIP fine-tunes hold it: r (out, 1), a Cartesian theta (out, in), plain bias."""
    return {
        "mlp.c_fc.r": gaussian(6, 1, seed=1).abs() + 0.5,
        "mlp.c_fc.theta": gaussian(6, 9, seed=2),
        "mlp.c_fc.bias": gaussian(6, seed=3),
        "ln.weight": gaussian(9, seed=4),
    }


def test_clip_gmp_is_weight_norm_by_another_name(tmp_path: Path) -> None:
    state = clip_state()
    save_file(state, tmp_path / "clip.safetensors")
    found = done("inspect", tmp_path / "clip.safetensors", "--json").json["layers"]
    assert [(layer["name"], layer["kind"], layer["dialect"]) for layer in found] == [
        ("mlp.c_fc", "wn", "clip-gmp")
    ]
    convert(tmp_path / "clip.safetensors", "sp", tmp_path / "sp.safetensors")
    r, theta = state["mlp.c_fc.r"].double(), state["mlp.c_fc.theta"].double()
    expected = (r * theta / theta.norm(dim=1, keepdim=True)).float()
    sp = load_file(tmp_path / "sp.safetensors")
    assert ulps(sp["mlp.c_fc.weight"], expected) <= 1
    assert torch.equal(sp["mlp.c_fc.bias"], state["mlp.c_fc.bias"])


def test_clip_gmp_is_written(tmp_path: Path) -> None:
    state = {"fc.weight": gaussian(6, 9), "fc.bias": gaussian(6, seed=1), "conv.weight": gaussian(4, 3, 3)}
    save_file(state, tmp_path / "model.safetensors")
    out = tmp_path / "clip.safetensors"
    report = convert(tmp_path / "model.safetensors", "wn", out, "--layout", "clip-gmp")
    found = load_file(out)
    assert {key: tuple(t.shape) for key, t in found.items()} == {
        "fc.r": (6, 1), "fc.theta": (6, 9), "fc.bias": (6,), "conv.weight": (4, 3, 3),
    }  # fmt: skip
    assert torch.equal(found["fc.theta"], state["fc.weight"])
    assert [layer["status"] for layer in report["layers"] if layer["name"] == "conv"] == ["skipped"]
    convert(out, "sp", tmp_path / "sp.safetensors")
    sp = load_file(tmp_path / "sp.safetensors")
    oracles.assert_came_back(sp["fc.weight"], state["fc.weight"], torch.float32)


def test_a_recurrent_layer_goes_both_ways(tmp_path: Path) -> None:
    """Names that do not end in ``weight``."""
    torch.manual_seed(0)
    plain = nn.LSTM(5, 4, num_layers=2)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    for flavour in FLAVOURS.values():
        out = tmp_path / f"{flavour.layout}.safetensors"
        convert(tmp_path / "model.safetensors", "wn", out, "--layout", flavour.layout)
        torch.manual_seed(1)
        wrapped = nn.LSTM(5, 4, num_layers=2)
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"):
            flavour.wrap(wrapped, name)
        wrapped.load_state_dict(load_file(out), strict=True)
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"):
            flavour.remove(wrapped, name)
        for key, value in wrapped.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[key], rtol=TORCH_FLOAT32, atol=0)


@pytest.mark.parametrize("wrap", [parametrizations.orthogonal, parametrizations.spectral_norm])
def test_another_parametrization_is_not_weight_norm(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(4, 4))
    wrap(net.layer)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    refused("convert", tmp_path / "model.pt", "--to", "sp", naming=("nothing to convert",), leaving=tmp_path)
