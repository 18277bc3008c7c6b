"""Files that are not what they say: exit 2, one line that names the file and the tensor, nothing left behind."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import assert_one_line, convert, entry, gaussian, raw_file, records_of, refused, run, snapshot
from torch import Tensor

WEIGHT = gaussian(4, 6).numpy().tobytes()
GOOD = {"fc.weight": entry("F32", [4, 6], 0, 96)}


def with_length(length: int, text: bytes = b"{}", data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + data


def good_file() -> bytes:
    text = json.dumps(GOOD).encode()
    return with_length(len(text), text, WEIGHT)


#: the whole file, and what the line names besides it
BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", ""),
    "length alone": (with_length(2, b""), ""),
    "truncated in the header": (good_file()[:40], "truncated"),
    "truncated in the data": (good_file()[:-1], ""),
    "no data at all": (good_file()[: -len(WEIGHT)], ""),
    "padded": (good_file() + b"\0", ""),
    "a huge length": (with_length(2**63), ""),
    "a length of 2^64-1": (with_length(2**64 - 1), ""),
    "a length beyond the file": (with_length(1000), ""),
    "another format": (b"PK\x03\x04" + bytes(60), ""),
    "a page of HTML": (b"<!DOCTYPE html><html><body>404</body></html>", ""),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", ""),
}
#: the header, given after a good entry's data, and what the line names
HEADERS: dict[str, tuple[object, str]] = {
    "not JSON": (b"{'fc.weight': 1}", "header"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "header"),
    "a list": ([], "header"),
    "a number": (b"17", "header"),
    "nested too deep": (b"[" * 200_000, "header"),
    "nested entries": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "header"),
    "a number of 10,000 digits": (b'{"fc.weight": ' + b"1" * 10_000 + b"}", "header"),
    "metadata of numbers": ({"__metadata__": {"format": 1}, **GOOD}, "__metadata__"),
    "metadata a list": ({"__metadata__": ["pt"], **GOOD}, "__metadata__"),
    "entry a list": ({"fc.weight": ["F32", [4, 6], [0, 96]]}, "fc.weight"),
    "no dtype": ({"fc.weight": {"shape": [4, 6], "data_offsets": [0, 96]}}, "fc.weight"),
    "dtype a number": ({"fc.weight": {**GOOD["fc.weight"], "dtype": 32}}, "fc.weight"),
    "dtype a list": ({"fc.weight": {**GOOD["fc.weight"], "dtype": ["F32"]}}, "fc.weight"),
    "unknown dtype": ({"fc.weight": entry("F128", [4, 6], 0, 96)}, "F128"),
    "shape too large": ({"fc.weight": entry("F32", [4, 7], 0, 96)}, "fc.weight"),
    "shape too small": ({"fc.weight": entry("F32", [4, 5], 0, 96)}, "fc.weight"),
    "negative shape": ({"fc.weight": entry("F32", [-4, -6], 0, 96)}, "fc.weight"),
    "shape of floats": ({"fc.weight": {**GOOD["fc.weight"], "shape": [4.0, 6.0]}}, "fc.weight"),
    "shape of booleans": ({"fc.weight": {"dtype": "F32", "shape": [True, 24], "data_offsets": [0, 96]}}, "fc.weight"),
    "shape a word": ({"fc.weight": {**GOOD["fc.weight"], "shape": "46"}}, "fc.weight"),
    "shape overflows 64 bits": ({"fc.weight": entry("F32", [2**40, 2**40], 0, 96)}, "fc.weight"),
    "one offset": ({"fc.weight": {**GOOD["fc.weight"], "data_offsets": [0]}}, "fc.weight"),
    "offsets turned": ({"fc.weight": entry("F32", [4, 6], 96, 0)}, "fc.weight"),
    "negative offsets": ({"fc.weight": entry("F32", [4, 6], -96, 0)}, "fc.weight"),
    "offsets beyond the file": ({"fc.weight": entry("F32", [4, 6], 96, 192)}, "fc.weight"),
    "a gap": ({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 20, 36)}, "'b'"),
    "a gap at the start": ({"a": entry("F32", [23], 4, 96)}, "'a'"),
    "an overlap": ({"a": entry("F32", [14], 0, 56), "b": entry("F32", [14], 40, 96)}, "'b'"),
    "the same bytes twice": ({"a": entry("F32", [24], 0, 96), "b": entry("F32", [24], 0, 96)}, "'"),
    "key twice": (b'{"a.weight":' + json.dumps(GOOD["fc.weight"]).encode() + b',"a.weight":' + json.dumps(GOOD["fc.weight"]).encode() + b"}", "a.weight"),
    "half a byte": ({"odd": entry("F4", [3], 0, 1), "rest": entry("U8", [95], 1, 96)}, "odd"),
    "a part of a byte": ({"odd": entry("F6_E2M3", [127], 0, 96)}, "odd"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "names"), BYTES.values(), ids=BYTES)
def test_broken_files(data: bytes, names: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    for command in (["convert", "--to", "gmp"], ["inspect"], ["inspect", "--stats", "--json"]):
        refused(
            command[0],
            tmp_path / "model.safetensors",
            *command[1:],
            naming=("model.safetensors", names),
            leaving=tmp_path,
        )


@pytest.mark.parametrize(("header", "names"), HEADERS.values(), ids=HEADERS)
def test_lying_headers(header: object, names: str, tmp_path: Path) -> None:
    raw_file(tmp_path / "model.safetensors", header, WEIGHT)
    naming = ("model.safetensors", names)
    refused("convert", tmp_path / "model.safetensors", "--to", "gmp", naming=naming, leaving=tmp_path)
    refused("inspect", tmp_path / "model.safetensors", naming=naming)


def test_a_shape_of_many_huge_numbers_costs_no_time(tmp_path: Path) -> None:
    """Their product has millions of digits; nobody needs to know them."""
    raw_file(tmp_path / "model.safetensors", {"fc.weight": entry("F32", [2**63] * 30_000, 0, 96)}, WEIGHT)
    refused("inspect", tmp_path / "model.safetensors", naming=("fc.weight",))


def test_an_empty_tensor_may_have_any_shape(tmp_path: Path) -> None:
    header = {
        **GOOD,
        "empty.weight": entry("F32", [0, 2**40], 96, 96),
        "none": entry("F32", [2**62, 0, 4], 96, 96),
    }
    raw_file(tmp_path / "model.safetensors", header, WEIGHT)
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")
    assert run("inspect", tmp_path / "out.safetensors", "--stats").code == 0


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """JSON can spell half a surrogate pair, UTF-8 cannot."""
    header = b'{"fc.weight":' + json.dumps(GOOD["fc.weight"]).encode() + b',"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[96,96]}}'  # fmt: skip
    raw_file(tmp_path / "model.safetensors", header, WEIGHT)
    refused(
        "convert",
        tmp_path / "model.safetensors",
        "--to",
        "gmp",
        naming=("model.safetensors",),
        leaving=tmp_path,
    )
    refused("inspect", tmp_path / "model.safetensors", naming=("model.safetensors",))


def layer(to: str) -> dict[str, Tensor]:
    weight, bias = gaussian(4, 6), gaussian(4, seed=1)
    if to == "sp":
        return {"fc.weight": weight, "fc.bias": bias}
    return {"fc.weight_g": weight.norm(dim=1, keepdim=True), "fc.weight_v": weight, "fc.bias": bias}


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
    state = {k: v.to(dtype) for k, v in layer(held).items()}
    state[key].view(-1)[-1] = value
    save_file({**state, "ok.weight": gaussian(3, 3)}, tmp_path / "model.safetensors")
    refused(
        "convert",
        tmp_path / "model.safetensors",
        "--to",
        to,
        naming=("model.safetensors", "fc"),
        leaving=tmp_path,
    )


@pytest.mark.parametrize("role", ["r", "theta", "lambda_"])
@pytest.mark.parametrize("to", ["sp", "wn"])
def test_what_is_not_finite_in_gmp_is_named(role: str, to: str, tmp_path: Path) -> None:
    state, records = gmp_file(tmp_path)
    state[f"fc.{role}"].view(-1)[-1] = math.nan
    written(tmp_path / "bad.safetensors", state, records)
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


def gmp_file(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and records of a small GmP file."""
    save_file(layer("sp"), folder / "model.safetensors")
    convert(folder / "model.safetensors", "gmp", folder / "model.gmp.safetensors")
    return load_file(folder / "model.gmp.safetensors"), records_of(folder / "model.gmp.safetensors")


def written(path: Path, state: dict[str, Tensor], records: object, version: object = 1) -> None:
    save_file(state, path, {"reparam": json.dumps({"version": version, "layers": records})})


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
    state, records = gmp_file(tmp_path)
    change(state, records)
    written(tmp_path / "bad.safetensors", state, records)
    refused(
        "convert", tmp_path / "bad.safetensors", "--to", "sp", naming=("bad.safetensors",), leaving=tmp_path
    )
    refused("inspect", tmp_path / "bad.safetensors", naming=("bad.safetensors",))


@pytest.mark.parametrize("text", ["", "{", "[]", "17", "null", '{"version": 1}', '{"version": 1, "layers": []}', "[" * 100_000, '{"layers": {}}'])  # fmt: skip
def test_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    save_file(layer("sp"), tmp_path / "bad.safetensors", {"reparam": text})
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
    state, records = gmp_file(tmp_path)
    written(tmp_path / "new.safetensors", state, records, version)
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
    save_file({**layer("sp"), "fc.theta": gaussian(3)}, tmp_path / "model.safetensors")
    refused(
        "convert",
        tmp_path / "model.safetensors",
        "--to",
        "gmp",
        naming=("fc.theta", "--exclude"),
        leaving=tmp_path,
    )
    save_file({**layer("wn"), "fc.weight": gaussian(2)}, tmp_path / "wn.safetensors")
    refused("convert", tmp_path / "wn.safetensors", "--to", "sp", naming=("fc.weight",), leaving=tmp_path)


def test_a_file_that_ends_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated after its header was checked, as a file still being copied may be."""
    from reparam.checkpoint import converting

    save_file({"fc.weight": gaussian(64, 64)}, tmp_path / "model.safetensors")
    plan = converting.make_plan

    def cut(*arguments: Any) -> Any:
        made = plan(*arguments)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        return made

    monkeypatch.setattr(converting, "make_plan", cut)
    ran = run("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert_one_line(ran)
    assert "model.safetensors" in ran.err
    assert "fc.weight" in ran.err
    assert list(snapshot(tmp_path)) == ["model.safetensors"]
