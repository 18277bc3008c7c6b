"""Writing safetensors in bounded memory: the header from the plan, then one tensor at a time, each at its place."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from reparam import dtypes
from reparam.checkpoint.cutting import Range, runs
from reparam.checkpoint.reading import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of one call. Linux caches larger writes in pages of 2 MB, which a virtual machine's host may have taken back: then
# writing takes five times as long.
_PIECE = 1 << 19

#: key -> (element type, shape)
Entries = Mapping[str, tuple[str, tuple[int, ...]]]


def header_of(entries: Entries, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes in front of the data, and each tensor's (offset, size) in the file.

    Wider types first, as the safetensors library does it: every tensor is then aligned to its own element size.
    """
    order = sorted(entries, key=lambda key: (-dtypes.bits(entries[key][0]), key))
    places: dict[str, tuple[int, int]] = {}
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for key in order:
        dtype, shape = entries[key]
        size = dtypes.nbytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[key] = (at, size)
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {k: (start + o, s) for k, (o, s) in places.items()}


def file_size(entries: Entries, metadata: Mapping[str, str]) -> int:
    """Bytes of the file these entries make."""
    return len(header_of(entries, metadata)[0]) + sum(dtypes.nbytes(*entry) for entry in entries.values())


class SafetensorsWriter:
    """Write every byte of every entry exactly once, in any order.

    ``close`` checks that, and that the bytes are on disk. A forked process may write too; what it wrote it has to tell
    the process that closes (:meth:`taken`, :meth:`count`).
    """

    def __init__(self, path: Path, entries: Entries, metadata: Mapping[str, str]) -> None:
        self._entries = entries
        header, self._places = header_of(entries, metadata)
        # What was written since it was last taken, and what was counted: together each byte of an entry once.
        self._written: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._failed: OSError | None = None
        self._file = path.open("xb", buffering=0)
        self._put(0, memoryview(header))

    def write(self, key: str, value: Tensor) -> None:
        """One tensor, of the planned type and shape."""
        dtype, shape = self._entries[key]
        assert (dtypes.code_of(value.dtype), tuple(value.shape)) == (dtype, shape), (
            key,
            value.dtype,
            value.shape,
        )
        self._write(key, 0, bytes_of(value))

    def write_part(self, key: str, shape: tuple[int, ...], box: Sequence[Range], value: Tensor) -> None:
        """A box of one tensor seen in ``shape``, of the planned type."""
        dtype, planned = self._entries[key]
        extents = tuple(stop - start for start, stop in box)
        assert (math.prod(shape), value.numel()) == (math.prod(planned), math.prod(extents)), (
            key,
            value.shape,
        )
        assert dtypes.code_of(value.dtype) == dtype, (key, value.dtype)
        starts, length = runs(shape, box)
        size, data = value.element_size(), bytes_of(value)
        for i, start in enumerate(starts):
            self._write(key, start * size, data[i * length * size : (i + 1) * length * size])

    def write_blocks(self, key: str, blocks: Iterable[memoryview]) -> None:
        """One tensor's bytes in C order."""
        at = 0
        for block in blocks:
            self._write(key, at, block)
            at += len(block)

    def size(self, key: str) -> int:
        """Bytes of one tensor."""
        return self._places[key][1]

    def _write(self, key: str, at: int, data: memoryview) -> None:
        offset, size = self._places[key]
        assert at + len(data) <= size, (key, at, len(data), size)
        self._put(offset + at, data)
        self._written[key] += len(data)

    def taken(self) -> Counter[str]:
        """Bytes written of every entry since this was last asked, which no longer count as written here."""
        written, self._written = self._written, Counter()
        return written

    def count(self, written: Counter[str]) -> None:
        """Count as written what was :meth:`taken`, there or here."""
        self._counted += written

    def _put(self, offset: int, data: memoryview) -> None:
        if hasattr(os, "pwrite"):
            while data:
                count = os.pwrite(self._file.fileno(), data[:_PIECE], offset)
                data, offset = data[count:], offset + count
            return
        self._file.seek(offset)  # Windows
        while data:
            data = data[self._file.write(data) :]

    def flush(self) -> None:
        """Bring to disk what is written so far, where the system can; ``close`` raises the first failure.

        Linux tells of a write that failed once: a later fsync would succeed, over a file with a hole.
        """
        if hasattr(os, "fdatasync"):
            try:
                os.fdatasync(self._file.fileno())
            except OSError as error:
                self._failed = self._failed or error

    def close(self) -> None:
        written = self._counted + self._written
        unwritten = [key for key, (_, size) in self._places.items() if written[key] != size]
        assert not unwritten, unwritten[:3]
        try:
            os.fsync(self._file.fileno())
            if self._failed is not None:
                raise self._failed
        finally:
            self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
