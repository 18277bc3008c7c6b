"""``reparam`` metadata that lies about its tensors, is of another release, or would make two tensors of one name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import a_layer, gaussian, gmp_layer, refused, with_records
from torch import Tensor

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def record(**changes: object) -> Change:
    return lambda state, records: records["fc.weight"].update(changes)


def drop(key: str) -> Change:
    return lambda state, records: state.__delitem__(key)


CONTRADICTIONS: dict[str, Change] = {
    "shape": record(shape=[6, 4]),
    "shape, n=2": record(shape=[12, 2], fan_in=2),
    "fan-in": record(fan_in=7),
    "dtype unknown": record(dtype="F31"),
    "dtype of no weight": record(dtype="I32"),
    "stored in another type": record(stored="F64"),
    "stored in 16 bits": record(stored="F16"),
    "axis beyond": record(axis=2),
    "negative axis": record(axis=-1),
    "groups": record(groups=3),
    "no groups": record(groups=0),
    "unknown kind": record(kind="polar"),
    "a kind tensors cannot have": record(kind="unit"),
    "another kind": record(kind="wn"),
    "kind sp": record(kind="sp"),
    "bias role": record(bias="beta"),
    "bias shape": record(bias_shape=[5]),
    "bias shape of another count": lambda s, r: (r["fc.weight"].update(bias_shape=[3]), s.update({"fc.lambda_": torch.ones(3)}))[0],
    "bias dtype": record(bias_dtype="X"),
    "bias kept, of another shape": lambda s, r: (r["fc.weight"].update(bias="bias"), s.update({"fc.bias": torch.ones(7)}))[0],
    "bias kept, of another type": lambda s, r: (r["fc.weight"].update(bias="bias"), s.update({"fc.bias": torch.arange(4)}))[0],
    "origin": record(theta_origin="south"),
    "shape of floats": record(shape=[4.5, 6]),
    "shape infinite": record(shape=[math.inf, 6]),
    "shape missing": lambda s, r: r["fc.weight"].pop("shape"),
    "record a list": lambda s, r: r.update({"fc.weight": []}),
    "theta missing": drop("fc.theta"),
    "r missing": drop("fc.r"),
    "lambda missing": drop("fc.lambda_"),
    "a layer that is not there": lambda s, r: r.update({"gone.weight": r["fc.weight"]}),
    "r of another length": lambda s, r: s.update({"fc.r": torch.ones(5)}),
    "theta of another width": lambda s, r: s.update({"fc.theta": torch.ones(4, 6)}),
    "theta in 16 bits": lambda s, r: s.update({"fc.theta": s["fc.theta"].half()}),
}  # fmt: skip


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_metadata_that_contradicts_the_tensors(change: Change, tmp_path: Path) -> None:
    state, records = gmp_layer(tmp_path)
    change(state, records)
    with_records(tmp_path / "bad.safetensors", state, records)
    refused(
        "convert", tmp_path / "bad.safetensors", "--to", "sp", naming=("bad.safetensors",), leaving=tmp_path
    )
    refused("inspect", tmp_path / "bad.safetensors", naming=("bad.safetensors",))


@pytest.mark.parametrize("text", ["", "{", "[]", "17", "null", '{"version": 1}', '{"version": 1, "layers": []}', "[" * 100_000, '{"layers": {}}'])  # fmt: skip
def test_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    save_file(a_layer("sp"), tmp_path / "bad.safetensors", {"reparam": text})
    refused(
        "convert",
        tmp_path / "bad.safetensors",
        "--to",
        "gmp",
        naming=("bad.safetensors", "reparam"),
        leaving=tmp_path,
    )


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5])
def test_a_version_of_another_release(version: object, tmp_path: Path) -> None:
    state, records = gmp_layer(tmp_path)
    with_records(tmp_path / "new.safetensors", state, records, version)
    line = refused(
        "convert",
        tmp_path / "new.safetensors",
        "--to",
        "sp",
        naming=("new.safetensors", version),
        leaving=tmp_path,
    )
    assert "upgrade" in line


def test_output_keys_that_collide(tmp_path: Path) -> None:
    save_file({**a_layer("sp"), "fc.theta": gaussian(3)}, tmp_path / "model.safetensors")
    refused(
        "convert",
        tmp_path / "model.safetensors",
        "--to",
        "gmp",
        naming=("fc.theta", "--exclude"),
        leaving=tmp_path,
    )
    save_file({**a_layer("wn"), "fc.weight": gaussian(2)}, tmp_path / "wn.safetensors")
    refused("convert", tmp_path / "wn.safetensors", "--to", "sp", naming=("fc.weight",), leaving=tmp_path)
