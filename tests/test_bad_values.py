"""Weights that are not finite, too large or too small: named, or converted as well as their type can hold them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import a_layer, convert, gaussian, gmp_layer, refused, with_records

from reparam.checkpoint import reading


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("held", "key"),
    [("sp", "fc.weight"), ("sp", "fc.bias"), ("wn", "fc.weight_g"), ("wn", "fc.weight_v"), ("wn", "fc.bias")],
)
@pytest.mark.parametrize("to", ["sp", "wn", "gmp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_named(
    held: str, key: str, to: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whatever the way: folding a NaN into plain weights hides it as well as any."""
    if held == to:
        return
    state = {k: v.to(dtype) for k, v in a_layer(held).items()}
    state[key].view(-1)[-1] = value
    save_file({**state, "ok.weight": gaussian(3, 3)}, tmp_path / "model.safetensors")
    refused(
        "convert",
        tmp_path / "model.safetensors",
        "--to",
        to,
        naming=(
            "model.safetensors",
            "fc",
            f"(1 value, the first at {key}{[n - 1 for n in state[key].shape]})",
        ),
        leaving=tmp_path,
    )


@pytest.mark.parametrize("pickled", [False, True])
def test_where_it_is_and_how_much_of_it(
    pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several blocks of a file, of a tensor in another memory order too."""
    monkeypatch.setattr(reading, "_BLOCK", 64)
    weight = gaussian(20, 30).t().contiguous().t() if pickled else gaussian(20, 30)
    weight[7, 3] = weight[7, 29] = math.nan
    weight[19, 29] = math.inf
    file = tmp_path / ("m.pt" if pickled else "m.safetensors")
    (torch.save if pickled else save_file)({"fc.weight": weight}, file)
    refused("convert", file, "--to", "gmp", naming=("(3 values, the first at fc.weight[7, 3])",))


@pytest.mark.parametrize("role", ["r", "theta", "lambda_"])
@pytest.mark.parametrize("to", ["sp", "wn"])
def test_what_is_not_finite_in_gmp_is_named(role: str, to: str, tmp_path: Path) -> None:
    state, records = gmp_layer(tmp_path)
    state[f"fc.{role}"].view(-1)[-1] = math.nan
    with_records(tmp_path / "bad.safetensors", state, records)
    refused(
        "convert",
        tmp_path / "bad.safetensors",
        "--to",
        to,
        naming=("bad.safetensors", "fc"),
        leaving=tmp_path,
    )


def test_a_bad_tensor_that_is_only_copied_is_no_obstacle(tmp_path: Path) -> None:
    state = {
        "fc.weight": gaussian(4, 6),
        "running": torch.tensor([math.nan]),
        "head.weight": torch.full((2, 2), math.inf),
    }
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")


SMALLEST_NORMAL = 2.0**-126


@pytest.mark.parametrize("to", ["wn", "gmp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_decayed_to_subnormal_numbers_convert(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weight decay leaves dead units like these in many a trained model: no fault of the file, and no failed check.

    Float32 holds neither their norm nor themselves to full precision: the error is relative to its smallest normal
    number there.
    """
    scale = torch.logspace(-44, -36, 400, dtype=torch.float64)[:, None]
    weight = (gaussian(400, 3, seed=3).double() * scale).to(dtype)
    weight[0] = torch.tensor([1.1042231898879559e-42, 7.703680346579612e-40, 4.954851240006121e-41])
    state = {"fc.weight": weight, "ok.weight": gaussian(4, 3, dtype=dtype)}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", to, tmp_path / "out.safetensors")
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    again, plain = load_file(tmp_path / "sp.safetensors")["fc.weight"].double(), state["fc.weight"].double()
    error, norm = (again - plain).norm(dim=1), plain.norm(dim=1).clamp_min(SMALLEST_NORMAL)
    assert torch.all(error <= 2e-7 * norm)
    assert not ((plain == 0) & (again != 0)).any()


def test_a_norm_beyond_float32_is_named(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.full((2, 4), 3e38)}, tmp_path / "model.safetensors")
    for to in ("wn", "gmp"):
        line = refused(
            "convert", tmp_path / "model.safetensors", "--to", to, naming=("fc.weight",), leaving=tmp_path
        )
        assert "--theta-dtype float64" in line
        convert(
            tmp_path / "model.safetensors", to, tmp_path / f"{to}.safetensors", "--theta-dtype", "float64"
        )
