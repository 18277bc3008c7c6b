"""WN whose norms run over what is cut, as any dim of torch's but the usual gives: they are summed in a pass before."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from column_cases import FLOAT32, assert_holds, convert, cut_small
from layer_kinds import Kind
from safetensors.torch import load_file, save_file
from support import bits, gaussian
from torch import Tensor

from reparam.checkpoint import convert_checkpoint
from reparam.checkpoint.dialects import bias_key
from reparam.errors import NonFiniteError

#: of a composed weight, rounded to float32 once
ROUNDED = 2.0**-23
#: of a composed float64 weight
FLOAT64 = 1e-14


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


SCALED = {
    "linear, dim=None": (Kind("fc.weight", (12, 9), bias=(12,)), ()),
    "linear, dim=1": (Kind("fc.weight", (12, 9), bias=(12,)), (1, 9)),
    "conv1d, dim=2": (Kind("c.weight", (10, 4, 3), bias=(10,)), (1, 1, 3)),
    "conv1d, dim=1": (Kind("c.weight", (10, 4, 3), bias=(10,)), (1, 4, 1)),
    "conv1d, norms of kernels": (Kind("c.weight", (10, 4, 3), bias=(10,)), (10, 4, 1)),
    "conv1d, no norm": (Kind("c.weight", (10, 4, 3), bias=(10,)), (10, 4, 3)),
    "conv transpose 1d, dim=0": (Kind("u.weight", (10, 6, 3), 1, bias=(6,)), (10, 1, 1)),
    "conv transpose 1d, dim=1": (Kind("u.weight", (10, 6, 3), 1, bias=(6,)), (1, 6, 1)),
    "conv transpose 1d, dim=2": (Kind("u.weight", (10, 6, 3), 1, bias=(6,)), (1, 1, 3)),
    "conv transpose 1d, grouped": (Kind("u.weight", (10, 4, 3), 1, 2, bias=(8,)), (1, 4, 1)),
    "hf conv1d, dim=None": (Kind("h.weight", (9, 14), 1, bias=(14,)), ()),
    "hf conv1d, dim=1": (Kind("h.weight", (9, 14), 1, bias=(14,)), (1, 14)),
}


def weight_norm_of(
    kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0
) -> dict[str, Tensor]:
    v, bias = kind.tensors(dtype)
    assert bias is not None
    g = (1 + gaussian(*shape, seed=9).abs()).to(dtype)
    return {f"{kind.key}_g": g, f"{kind.key}_v": v * scale, bias_key(kind.key): bias}


def composed(v: Tensor, g: Tensor) -> Tensor:
    """g·v/‖v‖, the norms by math.hypot: element by element, in float64."""
    sums: dict[tuple[int, ...], float] = {}
    shape = tuple(g.shape) or (1,) * v.dim()
    indices = list(itertools.product(*map(range, v.shape)))

    def place(index: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(0 if extent == 1 else i for i, extent in zip(index, shape, strict=True))

    for index in indices:
        sums[place(index)] = math.hypot(sums.get(place(index), 0.0), v[index].item())
    weight, g = torch.empty(v.shape, dtype=torch.float64), g.reshape(shape)
    for index in indices:
        weight[index] = v[index].item() / sums[place(index)] * g[place(index)].item()
    return weight


@pytest.mark.parametrize("to", ["sp", "gmp"])
@pytest.mark.parametrize(("kind", "shape"), SCALED.values(), ids=SCALED)
def test_norms_over_what_is_cut(
    kind: Kind, shape: tuple[int, ...], to: str, tmp_path: Path, small: None
) -> None:
    state = weight_norm_of(kind, shape, torch.float32)
    save_file(state, tmp_path / "model.safetensors")
    weight, bias = composed(state[f"{kind.key}_v"], state[f"{kind.key}_g"]), state[bias_key(kind.key)]
    file, (report,) = convert(tmp_path / "model.safetensors", kind, to)
    assert report.layers[0].status == "converted"
    assert_holds(file, kind, weight.float(), bias)
    if to == "sp":
        torch.testing.assert_close(load_file(file)[kind.key].double(), weight, rtol=ROUNDED, atol=0)


@pytest.mark.parametrize(("kind", "shape"), SCALED.values(), ids=SCALED)
def test_other_norms_become_those_of_rows(
    kind: Kind, shape: tuple[int, ...], tmp_path: Path, small: None
) -> None:
    """torch's new names come with dim=0, whatever was given under the old ones."""
    state = weight_norm_of(kind, shape, torch.float32)
    save_file(state, tmp_path / "model.safetensors")
    out, layout = tmp_path / "out.safetensors", "parametrizations"
    convert_checkpoint(
        tmp_path / "model.safetensors", "wn", output=out, layout=layout, axes={kind.key: kind.axis}
    )
    stem, found = kind.key.removesuffix("weight") + "parametrizations.weight.original", load_file(out)
    assert found[stem + "0"].shape == (kind.shape[0], *(1 for _ in kind.shape[1:]))
    expected = composed(state[f"{kind.key}_v"], state[f"{kind.key}_g"])
    again = composed(found[stem + "1"], found[stem + "0"])
    torch.testing.assert_close(again, expected, rtol=FLOAT32, atol=0)
    assert bits(found[bias_key(kind.key)]) == bits(state[bias_key(kind.key)])


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("name", ["linear, dim=None", "conv1d, dim=2", "hf conv1d, dim=1"])
def test_norms_of_float64_neither_over_nor_underflow(
    name: str, scale: float, tmp_path: Path, small: None
) -> None:
    kind, shape = SCALED[name]
    state = weight_norm_of(kind, shape, torch.float64, scale)
    save_file(state, tmp_path / "model.safetensors")
    file, _ = convert(tmp_path / "model.safetensors", kind, "sp")
    weight = composed(state[f"{kind.key}_v"], state[f"{kind.key}_g"])
    torch.testing.assert_close(load_file(file)[kind.key], weight, rtol=FLOAT64, atol=0)


@pytest.mark.parametrize("to", ["sp", "gmp"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_v_in_any_summand_is_named(value: float, to: str, tmp_path: Path, small: None) -> None:
    kind, shape = SCALED["conv1d, dim=2"]
    for index in ((0, 0, 0), (4, 3, 1), (9, 3, 2)):
        state = weight_norm_of(kind, shape, torch.float32)
        state[f"{kind.key}_v"][index] = value
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(NonFiniteError, match=r"'c\.weight_v' holds NaN"):
            convert(tmp_path / "model.safetensors", kind, to)
