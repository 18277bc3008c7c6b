"""What the tests share: the command run in this process, files to run it on, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reparam.cli.main import main
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reparam.kernels import backend

ROOT = Path(__file__).resolve().parent.parent
#: Real checkpoints and vectors, beside the clone; tests that need them are skipped without.
SHARED = Path(os.environ.get("REPARAM_SHARED", ROOT.parent / "shared"))


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def run(*arguments: object) -> Ran:
    """The ``reparam`` command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def run_apart(*arguments: object, **options: Any) -> Ran:
    """The same in a process of its own, which a crash does not take the tests down with."""
    ran = python("import sys; from reparam.cli.main import main; sys.exit(main())", *arguments, **options)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def done(*arguments: object) -> Ran:
    """A command that has to succeed."""
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    return ran


def convert(source: Path, to: str, output: Path, *options: object) -> dict[str, Any]:
    """``reparam convert`` that has to succeed: its report."""
    return done("convert", source, "--to", to, "-o", output, *options, "--json").json


def refused(*arguments: object, naming: tuple[object, ...] = (), leaving: Path | None = None) -> str:
    """A command that has to end with exit 2 and one line, and to leave ``leaving`` as it was.

    Args:
        arguments: the command.
        naming: what the line has to name, file, tensor or option.
        leaving: a folder.
    """
    before = snapshot(leaving) if leaving else {}
    ran = run(*arguments)
    assert_one_line(ran)
    for name in naming:
        assert str(name) in ran.err
    if leaving:
        assert snapshot(leaving) == before
    return ran.err


def assert_one_line(ran: Ran) -> None:
    """Exit 2, nothing on stdout, one line on stderr."""
    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.err.startswith("error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.endswith("\n")
    assert "Traceback" not in ran.err
    assert len(ran.err) < 600, ran.err


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, hidden ones too, with its bytes; None for folders."""
    entries = sorted(folder.rglob("*"))
    return {str(e.relative_to(folder)): e.read_bytes() if e.is_file() else None for e in entries}


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs ``code`` with ``arguments`` as sys.argv[1:]."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def convert_by(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Have conversions take ``encode`` or ``decode`` from here, the other as it is."""
    given = replace(backend.for_conversion(), **functions)
    monkeypatch.setattr(backend, "for_conversion", lambda: given)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """What safetensors' own reader finds in a file, element types it has no name for left out."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def header_of(path: Path) -> dict[str, Any]:
    """The JSON header, read with nothing but the standard library."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert isinstance(header, dict)
    return header


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor, read with nothing but the standard library."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = header_of(path)
    header.pop("__metadata__", None)
    return {
        key: (entry["dtype"], entry["shape"], data[start + begin : start + end])
        for key, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def records_of(path: Path) -> dict[str, dict[str, Any]]:
    """The layers in the ``reparam`` value of a file's metadata."""
    value = json.loads(header_of(path)["__metadata__"]["reparam"])
    assert set(value) == {"version", "layers"}
    assert value["version"] == 1
    layers = value["layers"]
    assert isinstance(layers, dict)
    return layers


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file of exactly this header (JSON, or bytes as they are) and these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_records(path: Path, tensors: Mapping[str, Tensor], records: object, version: object = 1) -> None:
    """A safetensors file whose metadata says this of its layers."""
    save_file(dict(tensors), path, {"reparam": json.dumps({"version": version, "layers": records})})


def a_layer(held: str = "sp") -> dict[str, Tensor]:
    """One layer of four units, plain or weight-normalized."""
    weight, bias = gaussian(4, 6), gaussian(4, seed=1)
    if held == "sp":
        return {"fc.weight": weight, "fc.bias": bias}
    return {"fc.weight_g": weight.norm(dim=1, keepdim=True), "fc.weight_v": weight, "fc.bias": bias}


def gmp_layer(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors and records of that layer's GmP file."""
    save_file(a_layer(), folder / "model.safetensors")
    convert(folder / "model.safetensors", "gmp", folder / "model.gmp.safetensors")
    return tensors_of(folder / "model.gmp.safetensors"), records_of(folder / "model.gmp.safetensors")


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn in float32 whatever the type, so that types can be compared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Both hold the same tensors: names, types, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert bits(found[key]) == bits(value), key


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """``folder`` as the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
