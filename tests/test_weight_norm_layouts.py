"""The names weight normalization goes by: relabelling keeps every byte; CLIP's, recurrent layers', and others'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import assert_same_bits, bits, convert, done, gaussian, raw_tensors, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch_weight_norm import DIMS, FLAVOURS, MODULES, TORCH_FLOAT32, Net, trained, ulps


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
