"""Files that are not what they say: exit 2, one line that names the file and the tensor, nothing left behind."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support import assert_one_line, convert, entry, gaussian, raw_file, refused, run, snapshot

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
