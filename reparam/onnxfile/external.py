"""Values outside of the ONNX file, which itself cannot be larger than 2 GB.

The data file is named by a hash of its content, NAME-0123456789abcdef.data: an ONNX file never finds another run's
values under the name it holds, and a run that ends between the two leaves the older pair whole.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

#: of every tensor's place, so that a runtime can map the file into memory
ALIGNMENT = 4096
_DIGITS = 16
_BLOCK = 1 << 22


def raw(x: Tensor) -> memoryview:
    """A tensor's elements in order, as bytes; they are those of the tensor itself where that is possible."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class DataWriter:
    """Writes values one after the other under a temporary name; :meth:`finish` gives the file its own.

    Args:
        target: the ONNX file the values belong to; the data file comes to lie beside it.

    Left without :meth:`finish`, nothing remains. A killed run's temporary is removed by the next that stages `target`.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        # A name that staging of `target` recognizes as its own.
        self._temporary = target.with_name(f".{target.name}.data.{os.getpid()}.partial")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview, aligned: bool = True) -> int:
        """Append ``data``; the offset it begins at."""
        if aligned and (rest := self._file.tell() % ALIGNMENT):
            self._append(bytes(ALIGNMENT - rest))
        offset = self._file.tell()
        self._append(data)
        return offset

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def finish(self) -> Path:
        """The data file under its own name, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = f"{self._target.stem}-{self._hash.hexdigest()[:_DIGITS]}.data"
        return self._temporary.replace(self._target.with_name(name))


@dataclass(frozen=True)
class Change:
    """New values for a part of a data file.

    Attributes:
        offset, length: of the part, bytes.
        values: gives that many bytes.
    """

    offset: int
    length: int
    values: Callable[[], memoryview]


def copy_changed(source: Path, target: Path, changes: Iterable[Change]) -> Path:
    """A data file for the ONNX file ``target``, of the layout of ``source``; its name.

    Args:
        source: left alone.
        target: see :class:`DataWriter`.
        changes: parts that do not overlap, one of which is in memory at a time.

    Raises:
        ValueError: parts overlap, or `source` ends before one.
    """
    with source.open("rb") as old, DataWriter(target) as new:
        for change in sorted(changes, key=lambda change: change.offset):
            _copy(old, new, change.offset)
            data = change.values()
            if len(data) != change.length:
                raise ValueError(f"{len(data)} bytes in the place of {change.length}")
            new.write(data, aligned=False)
            old.seek(len(data), os.SEEK_CUR)
        _copy(old, new, None)
        return new.finish()


def _copy(old: BinaryIO, new: DataWriter, stop: int | None) -> None:
    """From where ``old`` stands up to ``stop``, or to its end."""
    if stop is not None and stop < old.tell():
        raise ValueError("two tensors share bytes")
    while stop is None or old.tell() < stop:
        block = old.read(_BLOCK if stop is None else min(_BLOCK, stop - old.tell()))
        if not block:
            if stop is None:
                return
            raise ValueError("it ends before its tensors do")
        new.write(block, aligned=False)


@contextlib.contextmanager
def data_of(target: Path) -> Iterator[None]:
    """While the ONNX file ``target`` is made or replaced: its data files do not pile up beside it.

    Where that failed, those made meanwhile are removed; else those of the file that was replaced. Files of other names,
    and those that any ONNX file of the folder still names, stay.
    """
    before = _data_files(target)
    stale = {file for file in before if target.is_file() and _names(target, file)}
    try:
        yield
    except BaseException:
        stale = _data_files(target) - before
        raise
    finally:
        others = list(target.parent.glob("*.onnx")) if stale else []
        for file in stale:
            if not any(_names(path, file) for path in {*others, target} if path.is_file()):
                file.unlink(missing_ok=True)


def _data_files(target: Path) -> set[Path]:
    """What :class:`DataWriter` may have written for ``target``."""
    return set(target.parent.glob(f"{glob.escape(target.stem)}-{'[0-9a-f]' * _DIGITS}.data"))


def _names(path: Path, data: Path) -> bool:
    """Whether an ONNX file names a data file: looked for as bytes, as the file may be large, or no ONNX file at all.

    One that cannot be read may.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(data.name.encode()) >= 0
    except OSError:
        return True
