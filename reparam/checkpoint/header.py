"""Headers of safetensors files: parsed with the standard library, trusted in nothing.

A file is 8 bytes of little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam import dtypes
from reparam.errors import CheckpointError

#: The safetensors library's own limit.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie.

    Attributes:
        key: its name in the state_dict.
        dtype: safetensors code.
        shape: as stored.
        file: the file that holds it.
        offset: of its first byte in ``file``.
        nbytes: how many bytes to read there.
        stride: in elements, for a tensor stored in another memory order than its shape's; else None.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and ``__metadata__`` of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is malformed or untrue.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(_exactly(file.read(8), 8, path), "little")
            if length > MAX_HEADER or length > size - 8:
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size}: not safetensors, or truncated"
                )
            text = _exactly(file.read(length), length, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: malformed safetensors header (not an object)")
    try:
        json.dumps(header, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise CheckpointError(
            f"{path}: malformed safetensors header (a name that is no Unicode text)"
        ) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: malformed safetensors header (__metadata__ is not a map of strings)")
    tensors = [_entry(path, key, value, 8 + length) for key, value in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _contiguous(path, tensors, 8 + length, size)
    return {info.key: info for info in tensors}, metadata


def _exactly(data: bytes, count: int, path: Path) -> bytes:
    if len(data) != count:
        raise CheckpointError(
            f"{path}: truncated ({len(data)} of {count} header bytes)" if data else f"{path}: empty"
        )
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"'{twice}' stands in it twice")
    return value


def _entry(path: Path, key: str, value: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: malformed header entry of '{key}'") from None
    if not isinstance(dtype, str) or not dtypes.is_known(dtype):
        raise CheckpointError(
            f"{path}: '{key}' has unknown dtype {dtype!r}: upgrade reparam, or save it in another"
        )
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise CheckpointError(f"{path}: '{key}' has a malformed shape or offsets")
    claimed = _bits(dtype, shape)
    if claimed is None or claimed % 8:
        raise CheckpointError(
            f"{path}: '{key}' has a shape that is too large, or does not fill whole bytes of {dtype}"
        )
    if end - begin != claimed // 8:
        raise CheckpointError(
            f"{path}: '{key}' claims {end - begin} bytes, {dtype} of shape {list(shape)} takes {claimed // 8}"
        )
    return TensorInfo(key, dtype, shape, path, start + begin, end - begin)


def _bits(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bits of a tensor; None beyond what a file can hold, without multiplying millions of digits."""
    total = 0 if 0 in shape else dtypes.bits(dtype)
    for extent in shape:
        total *= extent
        if total >= 1 << 66:
            return None
    return total


def _contiguous(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    at = start
    for info in tensors:
        if info.offset != at:
            raise CheckpointError(f"{path}: bytes of '{info.key}' overlap another tensor's or leave a gap")
        at += info.nbytes
    if at != size:
        raise CheckpointError(f"{path}: tensors end at byte {at}, the file at {size}: truncated or padded")
