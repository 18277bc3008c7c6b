"""Output that appears whole or not at all: written under a temporary name beside its place, renamed when complete.

A killed run leaves only the temporary, which the next run to the same place removes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from reparam.errors import OutputError


@contextlib.contextmanager
def staged(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary path beside ``target``, where a file or a folder may be made; renamed to ``target`` at the end.

    Raises:
        OutputError: target exists and not ``force``; its folder is missing, read-only or full.
    """
    refuse_existing(target, force)
    parent = Path(os.path.abspath(target)).parent
    temporary = parent / f".{target.name}.{os.getpid()}.partial"
    try:
        for stale in _left_by_the_dead(parent, target.name, "partial"):
            _remove(stale)
        yield temporary
        _sync_tree(temporary)
        _replace(temporary, target)
        _sync_folder(parent)
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        _remove(temporary)


def refuse_existing(target: Path, force: bool, option: str = "-o") -> None:
    """Raise OutputError where writing ``target`` would lose something, or cannot work.

    What a killed run left half replaced is settled first. ``option`` is the one that names another target.
    """
    parent = Path(os.path.abspath(target)).parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such folder, to write {target.name} into")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: read-only: name another place with {option}")
    _settle(parent, target)
    if target.exists() or target.is_symlink():
        if not force:
            raise OutputError(f"{target}: exists: --force overwrites it, {option} names another place")
        if target.is_dir() and any(target.iterdir()) and not any(target.glob("*.safetensors*")):
            raise OutputError(
                f"{target}: a folder that holds no checkpoint: --force will not replace it, use {option}"
            )


def require_space(target: Path, needed: int) -> None:
    """Raise OutputError where the filesystem of ``target`` has not ``needed`` bytes left."""
    free = shutil.disk_usage(Path(os.path.abspath(target)).parent).free
    if free < needed:
        raise OutputError(
            f"{target}: {needed:,} bytes needed, {free:,} free on that disk: make room or use -o"
        )


def _replace(temporary: Path, target: Path) -> None:
    if not target.is_dir() or target.is_symlink():
        temporary.replace(target)
        return
    # A folder cannot be replaced in one step: the old one steps aside, and back if the new one cannot take its place.
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _output_error(target: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(f"{target}: the disk is full ({error.strerror}); nothing was left behind")
    return OutputError(f"{target}: cannot be written ({error.strerror or error})")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _left_by_the_dead(parent: Path, name: str, suffix: str) -> Iterator[Path]:
    for path in parent.glob(f".{glob.escape(name)}.*.{suffix}"):
        pid = path.name.split(".")[-2]
        # Its own number can only be an earlier process's: in a container they start again from 1.
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            yield path


def _settle(parent: Path, target: Path) -> None:
    """A folder that stepped aside for one that never came returns; one whose place is taken goes."""
    for aside in _left_by_the_dead(parent, target.name, "old"):
        if target.exists():
            _remove(aside)
        else:
            aside.rename(target)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there is no harmless way to ask: leave the file
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(path: Path) -> None:
    """Everything in a folder is on disk before the folder has its name; a file has seen to it itself."""
    if not path.is_dir():
        return
    for entry in path.iterdir():
        if entry.is_dir():
            _sync_tree(entry)
        else:
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    if os.name == "posix" and path.is_dir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
