"""Weight normalization as torch has it, old and new: files go both ways, torch's own code is the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import convert
from torch import Tensor, nn
from torch_weight_norm import (
    DIMS,
    FLAVOURS,
    MODULES,
    TORCH_FLOAT32,
    Flavour,
    a_net,
    removed_in_float64,
    trained,
    ulps,
)

import reparam

flavours = pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)


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


def turned(weight: Tensor) -> Tensor:
    """The same values with the axes in memory the other way round."""
    axes = tuple(reversed(range(weight.dim())))
    return weight.permute(axes).contiguous().permute(axes)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {"in order": lambda weight: weight, "turned": turned}


@flavours
@pytest.mark.parametrize("lay", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(40, 6), lambda: nn.Conv2d(4, 6, 3), lambda: nn.Linear(700, 900)],
    ids=["linear", "conv2d", "linear in blocks"],
)  # fmt: skip
def test_rows_of_zeros_are_no_nan_in_torch(
    make: Callable[[], nn.Module], lay: Callable[[Tensor], Tensor], flavour: Flavour, tmp_path: Path
) -> None:
    """A pickle keeps the strides of its tensors, in which a row may lie anywhere."""
    net = a_net(make)
    with torch.no_grad():
        net.layer.weight[[1, 4]] = 0.0
        net.layer.weight[5] = -0.0
    net.layer.weight.data = lay(net.layer.weight.data)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    out = tmp_path / "wn.safetensors"
    convert(tmp_path / "model.pt", "wn", out, "--layout", flavour.layout)
    normalized = a_net(make)
    flavour.wrap(normalized.layer)
    normalized.load_state_dict(load_file(out), strict=True)
    flavour.remove(normalized.layer)
    torch.testing.assert_close(normalized.layer.weight, net.layer.weight, rtol=TORCH_FLOAT32, atol=0)
    assert torch.count_nonzero(normalized.layer.weight[[1, 4, 5]]) == 0
    convert(out, "sp", tmp_path / "sp.safetensors")
    assert torch.count_nonzero(load_file(tmp_path / "sp.safetensors")["layer.weight"][[1, 4, 5]]) == 0


@pytest.mark.parametrize("lay", STRIDES.values(), ids=STRIDES)
def test_a_layer_of_a_row_of_zeros_is_no_nan_in_torch(lay: Callable[[Tensor], Tensor]) -> None:
    """From Python, where convert is given the module with the strides it has."""
    net = a_net(lambda: nn.Conv2d(4, 6, 3))
    with torch.no_grad():
        net.layer.weight[1] = 0.0
    net.layer.weight.data = lay(net.layer.weight.data)
    made = reparam.convert(nn.Sequential(net.layer), "wn", include=["0"]).state_dict()
    weight = torch._weight_norm(made["0.weight_v"].contiguous(), made["0.weight_g"], 0)
    torch.testing.assert_close(weight, net.layer.weight.detach(), rtol=TORCH_FLOAT32, atol=0)


@pytest.mark.parametrize("to", ["gmp", "wn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_norm_converts(dtype: torch.dtype, to: str, tmp_path: Path) -> None:
    """g·v/‖v‖ of 16-bit g and v is no 16-bit number: it may round to either neighbour, which is no failed check."""

    def make() -> nn.Module:
        return nn.Linear(600, 400)

    state = {k: v.to(dtype) for k, v in trained(make, FLAVOURS["old"], 1).state_dict().items()}
    wide = {key: value.float() for key, value in state.items()}
    exact = removed_in_float64(make, FLAVOURS["old"], 1, wide).double()
    save_file(state, tmp_path / "model.safetensors")
    out = tmp_path / "out.safetensors"
    convert(
        tmp_path / "model.safetensors", to, out, *(["--layout", "parametrizations"] if to == "wn" else [])
    )
    convert(out, "sp", tmp_path / "sp.safetensors")
    found = load_file(tmp_path / "sp.safetensors")["layer.weight"]
    assert found.dtype == dtype
    room = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-7 * exact.norm(dim=1, keepdim=True)
    assert torch.all((found.double() - exact).abs() <= room)
