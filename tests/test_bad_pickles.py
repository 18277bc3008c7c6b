"""PyTorch files that would run code, or are none: refused with the lines that would make a state_dict, nothing run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import assert_one_line, gaussian, refused, run, run_apart, snapshot
from torch import nn


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


class Getattr:
    """The same through two harmless-looking steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
formats = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


@formats
@pytest.mark.parametrize("bomb", [Bomb, Getattr])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".th", ".ckpt"])
def test_code_does_not_run(suffix: str, bomb: type, options: dict[str, bool], tmp_path: Path) -> None:
    witness = tmp_path / "it-ran"
    source = tmp_path / f"model{suffix}"
    torch.save({"fc.weight": gaussian(4, 4), "extra": bomb(witness)}, source, **options)
    for command in (["convert", source, "--to", "gmp"], ["inspect", source], ["inspect", source, "--stats"]):
        line = refused(*command, naming=(source.name,), leaving=tmp_path)
        assert "torch.load" in line
        assert "torch.save" in line
        assert not witness.exists()
    torch.load(source, weights_only=False)
    assert witness.exists(), "the file was a bomb"


def test_a_bare_pickle_does_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "it-ran"
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"fc.weight": Bomb(witness)}, protocol=2))
    refused("convert", tmp_path / "model.pt", "--to", "gmp", naming=("model.pt",), leaving=tmp_path)
    assert not witness.exists()


@formats
def test_a_whole_module_is_refused(options: dict[str, bool], tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "net.pt", **options)
    line = refused("convert", tmp_path / "net.pt", "--to", "gmp", naming=("net.pt",), leaving=tmp_path)
    assert "m = torch.load('net.pt', weights_only=False); torch.save(m.state_dict(), 'weights.pt')" in line


def test_the_two_lines_make_a_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the message says works as it stands."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4))
    torch.save(net, tmp_path / "net.pt")
    line = refused("convert", tmp_path / "net.pt", "--to", "gmp")
    monkeypatch.chdir(tmp_path)
    exec(line[line.index("m = torch.load") :].strip(), {"torch": torch})
    assert torch.equal(torch.load("weights.pt", weights_only=True)["0.weight"], net[0].weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(4, 4)), tmp_path / "net.pt")
    line = refused(
        "convert", tmp_path / "net.pt", "--to", "gmp", naming=("net.pt", "TorchScript"), leaving=tmp_path
    )
    assert "torch.jit.load" in line


def test_an_exported_program_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 4), (torch.zeros(2, 4),))
    torch.export.save(program, tmp_path / "net.pt2")
    line = refused("convert", tmp_path / "net.pt2", "--to", "gmp", naming=("net.pt2",), leaving=tmp_path)
    assert "torch.export.load" in line
    (tmp_path / "net.pt2").rename(tmp_path / "renamed.pt")
    refused("convert", tmp_path / "renamed.pt", "--to", "gmp", naming=("renamed.pt",), leaving=tmp_path)


NO_STATE: dict[str, Any] = {
    "a list": [torch.ones(2, 2)],
    "a tensor": torch.ones(2, 2),
    "a number": 3,
    "nothing": None,
    "an empty dict": {},
    "settings": {"lr": 0.1, "layers": ["a"]},
    "a nest of nothing": {"state_dict": {}},
    "too deep": {"run": {"weights": {"fc.weight": torch.ones(2, 2)}}},
    "keys that are no names": {0: torch.ones(2, 2), ("a", "b"): torch.ones(2, 2)},
}


@formats
@pytest.mark.parametrize("value", NO_STATE.values(), ids=NO_STATE)
def test_a_file_without_a_state_dict(value: Any, options: dict[str, bool], tmp_path: Path) -> None:
    torch.save(value, tmp_path / "model.pt", **options)
    refused("convert", tmp_path / "model.pt", "--to", "gmp", naming=("model.pt",), leaving=tmp_path)


def good(**options: bool) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({"fc.weight": gaussian(40, 40)}, buffer, **options)
    return buffer.getvalue()


@formats
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share: float, options: dict[str, bool], tmp_path: Path) -> None:
    data = good(**options)
    (tmp_path / "model.pt").write_bytes(data[: int(len(data) * share)])
    line = refused("convert", tmp_path / "model.pt", "--to", "gmp", naming=("model.pt",), leaving=tmp_path)
    assert "torch.load" not in line, "no advice to run what is merely broken"


NOT_PYTORCH = {
    "a page of HTML": b"<!DOCTYPE html><html></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "zeros": bytes(1000),
    "a number": pickle.dumps(17),
}


@pytest.mark.parametrize("data", NOT_PYTORCH.values(), ids=NOT_PYTORCH)
def test_other_files(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    refused("convert", tmp_path / "model.bin", "--to", "gmp", naming=("model.bin",), leaving=tmp_path)


# Fields of an entry in a zip's central directory: where, and what a broken or hostile writer puts there.
DIRECTORY = {
    "a name that is no UTF-8": ((8, b"\x00\x08"), (46, b"\x80\x81")),
    "an encrypted record": ((8, b"\x01\x00"),),
    "an unknown compression": ((10, b"\x63\x00"),),
    "a newer zip": ((6, b"\xff\x00"),),
    "a date that is none": ((12, b"\xff\xff\xff\xff"),),
    "a size that lies": ((24, b"\x01\x00\x00\x00"),),
    "sizes of 4 GB": ((20, b"\xff\xff\xff\xff\xff\xff\xff\xff"),),
    "an offset beyond the file": ((42, b"\xf0\xff\xff\x7f"),),
    "an offset of 4 GB": ((42, b"\xff\xff\xff\xff"),),
    "another record's offset": ((42, b"\x00\x00\x00\x00"),),
    "a name longer than the rest": ((28, b"\xff\xff"),),
    "an extra field longer than the rest": ((30, b"\xff\xff"),),
}


@pytest.mark.parametrize("record", [0, -1])
@pytest.mark.parametrize("change", DIRECTORY.values(), ids=DIRECTORY)
def test_an_archive_with_a_broken_directory(
    change: tuple[tuple[int, bytes], ...], record: int, tmp_path: Path
) -> None:
    """Refused in one line, or read as torch reads it; never guessed at."""
    data = bytearray(good())
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    for at, value in change:
        start = entries[record] + at
        data[start : start + len(value)] = value
    (tmp_path / "model.pt").write_bytes(data)
    ran = run("convert", tmp_path / "model.pt", "--to", "wn", "--theta-dtype", "float64")
    if ran.code != 0:
        assert_one_line(ran)
        assert "model.pt" in ran.err
        return
    found = load_file(tmp_path / "model.wn.safetensors")["fc.weight_v"]
    assert torch.equal(found, torch.load(tmp_path / "model.pt", weights_only=True)["fc.weight"])


def test_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused("convert", tmp_path / "model.pt", "--to", "gmp", naming=("model.pt",), leaving=tmp_path)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_nothing_but_the_line_reaches_the_terminal(tmp_path: Path) -> None:
    """torch has warnings and a log of its own."""
    torch.save({"fc.weight": gaussian(4, 4), "odd": torch.eye(3).to_sparse_csr()}, tmp_path / "model.pt")
    before = snapshot(tmp_path)
    ran = run_apart("convert", tmp_path / "model.pt", "--to", "gmp")
    assert_one_line(ran)
    assert ran.err.startswith(f"error: {tmp_path / 'model.pt'}")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("suffix", [".h5", ".onnx", ".gguf", ".txt", ".npz", ""])
def test_other_suffixes_are_named(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"data")
    line = refused(
        "convert", tmp_path / f"model{suffix}", "--to", "gmp", naming=(f"model{suffix}",), leaving=tmp_path
    )
    assert "safetensors" in line
