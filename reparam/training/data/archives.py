"""Arrays by name: .npz and .safetensors.

x, y | inputs, targets | data, labels | images, labels              one part
x_train, y_train, x_test, y_test | x_val, y_val | train_x, ...      two
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reparam.errors import DataError
from reparam.training.data.columns import listing
from reparam.training.data.parts import Arrays, Part, Rows, Source

SUFFIXES = (".npz", ".safetensors")
_INPUTS = ("x", "X", "inputs", "input", "data", "images", "features")
_TARGETS = ("y", "Y", "targets", "target", "labels", "label")
_VALIDATION = ("val", "valid", "validation", "test")
_CHANNELS = (1, 3)

_Array = NDArray[Any]


def read_archive(path: Path, inputs: Sequence[str] | str, target: Sequence[str] | str | None) -> Source:
    """Read inputs and targets from the arrays of a file.

    Args:
        inputs, target: names of one array each; the usual names without.

    Raises:
        DataError: not such a file, truncated, an array of Python objects, no array of that name, or arrays of different lengths.
    """
    with _open(path) as archive:
        names = archive.names
        chosen = _single(path, inputs, "--inputs"), _single(path, target or (), "--target")
        for option, name in zip(("--inputs", "--target"), chosen, strict=True):
            if name and name not in names:
                raise DataError(f"{path}: {option} {name}: no such array; there are {listing(names)}")
        keys = [_usual(names, chosen, part) for part in ("", "train")]
        train = next((pair for pair in keys if pair), None)
        if train is None:
            raise DataError(
                f"{path}: which arrays are inputs and targets? There are {listing(names)}; name them by --inputs and"
                " --target"
            )
        validation = next((pair for part in _VALIDATION if (pair := _usual(names, (None, None), part))), None)
        notes = [f"inputs: array `{train[0]}`; target: array `{train[1]}`"]
        if validation:
            notes.append(f"validation: arrays `{validation[0]}` and `{validation[1]}`")
        return Source(
            _part(path, archive, train, notes),
            _part(path, archive, validation, []) if validation else None,
            tuple(notes),
        )


def _single(path: Path, names: Sequence[str] | str, option: str) -> str | None:
    names = [names] if isinstance(names, str) else list(names)
    if len(names) > 1:
        raise DataError(f"{path}: {option} {','.join(names)}: one array holds all of them; name one")
    return names[0] if names else None


def _usual(names: Sequence[str], chosen: tuple[str | None, str | None], part: str) -> tuple[str, str] | None:
    """Names of the inputs and targets of a part, if both are there."""
    found = [
        name or next((form for usual in usuals for form in _forms(usual, part) if form in names), None)
        for name, usuals in zip(chosen, (_INPUTS, _TARGETS), strict=True)
    ]
    return (found[0], found[1]) if found[0] and found[1] else None


def _forms(name: str, part: str) -> tuple[str, ...]:
    return (f"{name}_{part}", f"{part}_{name}") if part else (name,)


def _part(path: Path, archive: _Archive, names: tuple[str, str], notes: list[str]) -> Part:
    values, labels = (archive.read(name) for name in names)
    if not values.ndim or labels.ndim not in (1, 2) or len(values) != len(labels):
        raise DataError(
            f"{path}: `{names[0]}` is {list(values.shape)} and `{names[1]}` {list(labels.shape)}; expected [N, ...] and"
            " [N] or [N, K]"
        )
    if not values.size:
        raise DataError(f"{path}: array `{names[0]}` is empty")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return Part(Arrays(_tensor(path, names[0], values, notes), Rows(str(path))), labels)


def _tensor(path: Path, name: str, values: _Array, notes: list[str]) -> Tensor:
    """Inputs as samples hold them: uint8 images (N, C, H, W), float32 or int64 arrays."""
    if values.dtype == np.uint8 and values.ndim == 4 and values.shape[-1] in _CHANNELS:
        if values.shape[1] not in _CHANNELS:
            notes.append(f"images: array `{name}` {list(values.shape)} is read as [N, H, W, C]")
            values = values.transpose(0, 3, 1, 2)
    elif values.dtype == np.uint8 and values.ndim == 3:
        values = values[:, None]
    elif values.dtype.kind in "iu" and values.dtype != np.uint8:
        values = values.astype(np.int64)
    elif values.dtype != np.uint8 or values.ndim != 4:
        values = values.astype(np.float32)
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{path}: array `{name}`, row {int(finite.argmin())}: holds NaN or Inf; remove the row"
            )
    return torch.from_numpy(np.ascontiguousarray(values if values.ndim > 1 else values[:, None]))


class _Archive(Protocol):
    """An open file of named arrays."""

    @property
    def names(self) -> list[str]: ...

    def read(self, name: str) -> _Array: ...


class _Npz:
    def __init__(self, path: Path, file: np.lib.npyio.NpzFile) -> None:
        self._path, self._file = path, file
        self.names = list(file.files)

    def read(self, name: str) -> _Array:
        try:
            found: _Array = self._file[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise DataError(
                f"{self._path}: array `{name}` holds Python objects, which are pickled and would run code; save numbers"
            ) from error
        return _checked(self._path, name, found)


class _Safetensors:
    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self.names = list(file.keys())

    def read(self, name: str) -> _Array:
        tensor: Tensor = self._file.get_tensor(name)
        # NumPy has no bfloat16.
        return _checked(self._path, name, (tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _checked(path: Path, name: str, values: _Array) -> _Array:
    if values.dtype.kind not in "biufU":
        raise DataError(
            f"{path}: array `{name}` holds {values.dtype}; expected numbers, or strings for labels"
        )
    return values


@contextmanager
def _open(path: Path) -> Iterator[_Archive]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield _Safetensors(path, file)
        else:
            # Opened here: numpy leaves a file that is no archive open.
            with path.open("rb") as stream:
                file = np.load(stream, allow_pickle=False)
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise DataError(f"{path}: one array, not an archive of arrays; save it with numpy.savez")
                yield _Npz(path, file)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read ({why})") from error
