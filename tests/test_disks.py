"""Disks that are read-only, full, or fail at the last step: one line, nothing lost, nothing half-written."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support import done, gaussian, python, refused, run, snapshot

from reparam.checkpoint import staging

NOBODY = 65534


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody can enter, as pytest's own cannot be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


# The first command, before, has every module imported that the others need: nobody may not read root's Python.
AS_NOBODY = f"""
import contextlib, io, os, sys
from reparam.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(sys.argv[1].split("|")) == 0
if os.getuid() == 0:
    os.setgid({NOBODY})
    os.setuid({NOBODY})
print(*[main(arguments.split("|")) for arguments in sys.argv[2:]])
"""


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder(public: Path, tmp_path: Path) -> None:
    """Tried by a user whom permissions bind, which root is not."""
    save_file({"fc.weight": gaussian(40, 40)}, public / "model.safetensors")
    (public / "model").mkdir()
    shutil.copy(public / "model.safetensors", public / "model")
    for file in public.rglob("*.safetensors"):
        file.chmod(0o644)
    (public / "secret.safetensors").write_bytes((public / "model.safetensors").read_bytes())
    (public / "secret.safetensors").chmod(0)
    if os.getuid() == 0:
        os.chown(public, NOBODY, NOBODY)
    public.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    before = sorted(public.rglob("*"))
    commands = [
        f"convert|{public / 'model.safetensors'}|--to|gmp",
        f"convert|{public / 'model'}|--to|gmp",
        f"convert|{public / 'secret.safetensors'}|--to|gmp|--dry-run",
        f"inspect|{public / 'secret.safetensors'}",
    ]
    ran = python(AS_NOBODY, f"{commands[0]}|-o|{tmp_path / 'out.safetensors'}", *commands)
    public.chmod(0o755)
    lines = ran.stderr.splitlines()
    assert ran.stdout == "2 2 2 2\n", ran.stderr
    assert len(lines) == 4, lines
    assert all(line.startswith("error: ") for line in lines)
    assert "read-only" in lines[0]
    assert "read-only" in lines[1]
    assert str(public) in lines[0]
    assert "secret.safetensors" in lines[2]
    assert "secret.safetensors" in lines[3]
    assert sorted(public.rglob("*")) == before


LIMITED = """
import resource, sys
from reparam.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
print(*[main(["convert", path, "--to", "gmp"]) for path in sys.argv[2:]])
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """The kernel refuses the write, as it does when the last block is gone; with room for it the next succeeds."""
    (tmp_path / "model").mkdir()
    save_file(
        {"a.weight": gaussian(300, 300), "b.table": gaussian(300, 300)},
        tmp_path / "model" / "model.safetensors",
    )
    before = snapshot(tmp_path)
    ran = python(LIMITED, 300_000, tmp_path / "model", tmp_path / "model" / "model.safetensors")
    lines = ran.stderr.splitlines()
    assert ran.stdout == "2 2\n", ran.stderr
    assert len(lines) == 2
    for line, name in zip(lines, ("model-gmp", "model.gmp.safetensors"), strict=True):
        assert line.startswith("error: ")
        assert "full" in line
        assert name in line
    assert snapshot(tmp_path) == before
    done("convert", tmp_path / "model", "--to", "gmp")


def test_space_is_checked_first(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").write_bytes(bytes(5000))
    usage = shutil.disk_usage(source.parent)
    asked: list[Path] = []

    def nearly_full(path: Any) -> Any:
        asked.append(Path(path))
        return usage._replace(free=5_000)

    monkeypatch.setattr(staging.shutil, "disk_usage", nearly_full)
    for path in (source, folder):
        line = refused("convert", path, "--to", "gmp", naming=("5,000 free",), leaving=source.parent)
        assert "bytes needed" in line
        assert asked.pop() == source.parent
    done("convert", source, "--to", "gmp", "--dry-run")


def test_a_disk_with_just_enough(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = run("convert", source, "--to", "gmp", "--dry-run", "--json").json["bytes_after"]
    usage = shutil.disk_usage(source.parent)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    refused("convert", source, "--to", "gmp", leaving=source.parent)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=size))
    done("convert", source, "--to", "gmp")


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_an_error_at_the_last_step_leaves_nothing(
    step: str, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(os, "rename", fail)
    for path in (source, folder):
        refused("convert", path, "--to", "gmp", naming=("gmp", "Input/output error"), leaving=source.parent)


def test_replacing_a_folder_that_fails_puts_the_old_one_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("convert", folder, "--to", "gmp")
    (folder.parent / "model-gmp" / "notes.txt").write_text("keep me until the new one is there")
    rename = Path.rename

    def fail(self: Path, target: Any) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    refused("convert", folder, "--to", "gmp", "--force", naming=("model-gmp",), leaving=folder.parent)
