"""What ``convert`` checks of itself: no wrong value passes, whatever the types, the blocks and the ties are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_kinds import KINDS, Kind
from safetensors.torch import load_file, save_file
from support import convert, convert_by, done, gaussian, records_of, refused, run, snapshot
from torch import Tensor

from reparam.checkpoint import mapping
from reparam.kernels import hyperspherical
from reparam.parameterizations import geometric

DECODE, LAMBDA = hyperspherical.decode, geometric._lambda
#: error of a row over its norm
FLOAT64_ROW, FLOAT32_ROW = 1e-12, 2e-7


def one_nan(rows: Tensor) -> Tensor:
    rows[0, 0] = math.nan
    return rows


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one NaN": one_nan,
    "all infinite": lambda rows: rows * math.inf,
    "a little long": lambda rows: rows * (1 + 4e-7),
    "a little turned": lambda rows: rows + 4e-7 * rows.roll(1, 1),
    "longer by less than a bfloat16 shows": lambda rows: rows * (1 + 4e-4),
    "all zero": lambda rows: rows * 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_decode_is_caught(
    wrong: Callable[[Tensor], Tensor], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"fc.weight": gaussian(6, 40, dtype=dtype)}, tmp_path / "model.safetensors")
    convert_by(monkeypatch, decode=lambda *arguments: wrong(DECODE(*arguments)))
    before = snapshot(tmp_path)
    ran = run("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert ran.code == 1, ran
    assert "'fc.weight'" in ran.err
    assert snapshot(tmp_path) == before


def test_angles_in_float64_are_held_to_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"fc.weight": gaussian(6, 40)}, tmp_path / "model.safetensors")
    convert_by(monkeypatch, decode=lambda *arguments: DECODE(*arguments) * (1 + 1e-11))
    assert run("convert", tmp_path / "model.safetensors", "--to", "gmp", "--theta-dtype", "float64").code == 1


def test_a_wrong_bias_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"fc.weight": gaussian(6, 4), "fc.bias": gaussian(6, seed=1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(geometric, "_lambda", lambda radius, bias: LAMBDA(radius, bias) * (1 + 1e-6))
    ran = run("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert (ran.code, "bias error" in ran.err) == (1, True), ran.err


@pytest.mark.parametrize("to", ["wn", "gmp"])
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-40, 1e200, 1e300])
def test_float64_of_every_size(scale: float, to: str, tmp_path: Path) -> None:
    weight = gaussian(4, 6).double() * scale
    save_file({"fc.weight": weight}, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", to, tmp_path / "out.safetensors")
    assert report["roundtrip"]["max_row_error"] <= FLOAT64_ROW
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")["fc.weight"]
    assert (again / scale - weight / scale).norm(dim=1).max() <= FLOAT64_ROW * (weight / scale).norm(
        dim=1
    ).min()


@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_a_norm_too_small_for_float32_is_refused(to: str, tmp_path: Path) -> None:
    save_file({"fc.weight": gaussian(4, 6).double() * 1e-200}, tmp_path / "model.safetensors")
    line = refused(
        "convert",
        tmp_path / "model.safetensors",
        "--to",
        to,
        "--theta-dtype",
        "float32",
        naming=("fc.weight",),
    )
    assert "--theta-dtype float64" in line


def test_long_rows_of_equal_entries(tmp_path: Path) -> None:
    """A single running sum of a million equal squares rounds to one side each time."""
    save_file({"fc.weight": torch.full((1, 10**6), 0.1, dtype=torch.float64)}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")
    radius = float(load_file(tmp_path / "out.safetensors")["fc.r"])
    assert abs(radius / (0.1 * 1000) - 1) <= FLOAT64_ROW


def test_a_lambda_too_small_for_float32_is_not_used(tmp_path: Path) -> None:
    bias = torch.tensor([1e-36, 1e-34])
    save_file({"fc.weight": gaussian(2, 6) * 1e10, "fc.bias": bias}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")
    assert records_of(tmp_path / "out.safetensors")["fc.weight"]["bias"] == "bias"
    assert torch.equal(load_file(tmp_path / "out.safetensors")["fc.bias"], bias)


def test_weights_their_own_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    state = {"fc.weight_g": torch.full((2, 1), 5e5), "fc.weight_v": gaussian(2, 6, dtype=torch.float16)}
    save_file(state, tmp_path / "model.safetensors")
    for to in ("gmp", "sp"):
        refused("convert", tmp_path / "model.safetensors", "--to", to, naming=("fc", "F16"), leaving=tmp_path)


@pytest.mark.parametrize("to", ["sp", "gmp"])
def test_a_shared_v_with_a_g_of_its_own_is_another_weight(to: str, tmp_path: Path) -> None:
    v = gaussian(4, 6)
    state = {
        "a.weight_g": torch.full((4, 1), 1.0),
        "a.weight_v": v,
        "b.weight_g": torch.full((4, 1), 5.0),
        "b.weight_v": v,
    }
    torch.save(state, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", to, tmp_path / "out.safetensors")
    if to == "gmp":
        convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    back = load_file(tmp_path / ("out.safetensors" if to == "sp" else "sp.safetensors"))
    for name, norm in (("a", 1.0), ("b", 5.0)):
        torch.testing.assert_close(
            back[f"{name}.weight"].norm(dim=1), torch.full((4,), norm), rtol=FLOAT32_ROW, atol=0
        )


@pytest.mark.parametrize("to", ["wn", "gmp"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_blocks_make_no_difference(
    kind: Kind, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into many blocks, some of them smaller, and chunks within them: the same bytes, and the same report."""
    weight, bias = kind.tensors(torch.float32)
    state = {kind.key: weight} if bias is None else {kind.key: weight, _bias_key(kind): bias}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    axis = ("--axis", f"{kind.key}={kind.axis}")
    whole = convert(tmp_path / "model.safetensors", to, tmp_path / "whole.safetensors", *axis)
    monkeypatch.setattr(mapping, "_BLOCK", 8)
    monkeypatch.setattr(hyperspherical, "_CHUNK", 12)
    parts = convert(tmp_path / "model.safetensors", to, tmp_path / "parts.safetensors", *axis)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "parts.safetensors").read_bytes()
    assert whole["roundtrip"] == parts["roundtrip"]
    assert [layer.get("inexact_at") for layer in whole["layers"]] == [
        layer.get("inexact_at") for layer in parts["layers"]
    ]


def _bias_key(kind: Kind) -> str:
    from reparam.checkpoint.dialects import bias_key

    return bias_key(kind.key)


def test_one_unusable_lambda_in_any_block_keeps_the_whole_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_BLOCK", 8)
    for unit in (0, 5, 11):
        bias = gaussian(12, seed=1)
        bias[unit] = 2.0**30
        save_file({"fc.weight": gaussian(12, 6), "fc.bias": bias}, tmp_path / "model.safetensors")
        convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors", "--force")
        assert torch.equal(load_file(tmp_path / "out.safetensors")["fc.bias"], bias)


def test_inexact_weights_are_named_by_their_index(tmp_path: Path) -> None:
    """bfloat16 [1e-5, −1]: near π a float32 angle has an ulp of 2.4e-7, too coarse for the sine of 1e-5."""
    weight = torch.eye(6, 4)
    weight[4, 2:] = torch.tensor([1e-5, -1.0])
    save_file({"fc.weight": weight.bfloat16()}, tmp_path / "model.safetensors")
    (layer,) = convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")["layers"]
    assert (layer["inexact"], layer["inexact_at"]) == (1, [[4, 2]])
    out = done("convert", tmp_path / "model.safetensors", "--to", "gmp", "--force").out
    assert "fc.weight[4, 2]" in out
    left = done(
        "convert", tmp_path / "model.safetensors", "--to", "gmp", "--force", "--theta-dtype", "float64"
    ).out
    assert "not bit for bit: " not in left


def test_exact_counts_biases_too(tmp_path: Path) -> None:
    """Weights on the axes come back exactly; b/r·r does not always."""
    bias = torch.tensor([0.7, 0.3, 0.9, 0.1])
    state = {"fc.weight": torch.eye(4) * 3, "fc.bias": bias, "free.weight": torch.eye(4)}
    save_file(state, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", "gmp", tmp_path / "all.safetensors")
    assert report["roundtrip"]["inexact"] == 0
    assert report["roundtrip"]["bias_inexact"] > 0
    report = convert(tmp_path / "model.safetensors", "gmp", tmp_path / "exact.safetensors", "--exact")
    assert {layer["name"]: layer["status"] for layer in report["layers"]} == {
        "fc": "skipped",
        "free": "converted",
    }


def test_a_temporary_of_a_former_process_of_this_number_goes(tmp_path: Path) -> None:
    """In a container process numbers start again from 1."""
    save_file({"fc.weight": gaussian(4, 6)}, tmp_path / "model.safetensors")
    (tmp_path / f".model.gmp.safetensors.{os.getpid()}.partial").write_bytes(b"half")
    done("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gmp.safetensors", "model.safetensors"]


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"fc.weight": gaussian(4, 6)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1]
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1]
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (events.append("rename"), rename(self, target))[1]
    )
    done("convert", folder, "--to", "gmp")
    at = events.index("rename")
    synced = {Path(event).name for event in events[:at]}
    assert {"model.safetensors", "config.json"} <= synced
    assert any(name.endswith(".partial") for name in synced), "the folder itself"
    assert events[at + 1 :] == [str(tmp_path.resolve())]


def test_tensors_tied_to_what_is_no_layer_stay_tied(tmp_path: Path) -> None:
    shared = gaussian(6, 8)
    torch.save({"a_table": shared, "fc1.weight": shared, "fc2.weight": shared}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", "gmp", tmp_path / "out.safetensors")
    assert sorted(load_file(tmp_path / "out.safetensors")) == ["a_table", "fc1.r", "fc1.theta"]


def test_a_single_dictionary_of_tensors_is_found(tmp_path: Path) -> None:
    """As vocoders are saved."""
    torch.save({"generator": {"fc.weight": gaussian(4, 6)}, "steps": 7}, tmp_path / "model.pt")
    report = convert(tmp_path / "model.pt", "gmp", tmp_path / "out.safetensors")
    assert any("generator" in note for note in report["notes"])
    torch.save(
        {"generator": {"w": gaussian(4, 6)}, "discriminator": {"w": gaussian(4, 6)}}, tmp_path / "two.pt"
    )
    refused("convert", tmp_path / "two.pt", "--to", "gmp", naming=("two.pt", "single dictionary"))
