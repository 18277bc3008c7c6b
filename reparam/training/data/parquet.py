"""Parquet: one column of encoded images (Hugging Face's struct{bytes, path}, or plain binary), or columns of numbers.

A folder holds train.parquet or train-00000-of-00002.parquet and so on, itself or in data/; validation likewise. The
encoded images of a set are kept in memory, not their pixels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reparam.errors import DataError
from reparam.training.data.columns import choose
from reparam.training.data.extra import need
from reparam.training.data.images import ImageBytes
from reparam.training.data.parts import Arrays, Labels, Part, Rows, Shards, Source

SUFFIXES = (".parquet",)
_VALIDATION = ("val", "valid", "validation", "test")

_Columns = Sequence[str] | str


def find_parquet(folder: Path) -> dict[str, list[Path]]:
    """The files of each part that a folder holds: "train", "validation"."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for part in ("train", *_VALIDATION):
            named = re.compile(rf"{part}(-\d+-of-\d+)?\.parquet")
            if files := sorted(file for file in place.glob("*.parquet") if named.fullmatch(file.name)):
                found.setdefault("train" if part == "train" else "validation", files)
    return found


def read_parquet(parts: dict[str, list[Path]], inputs: _Columns, target: _Columns | None) -> Source:
    """Read a set of one or two parts.

    Args:
        parts: the files of "train" and, if there is one, of "validation".
        inputs, target: columns; see :func:`columns.choose`. Without ``inputs``, the one column that holds images, if
            any does.

    Raises:
        DataError: not parquet, truncated, no rows, a shard missing, columns missing or of a kind that cannot be
            learned, a row without value, or more than fits in memory.
    """
    notes: list[str] = []
    train = _part(parts["train"], inputs, target, notes)
    if "validation" not in parts:
        return Source(train, None, tuple(notes))
    notes.append(f"validation: {parts['validation'][0].name}" + " and so on" * (len(parts["validation"]) > 1))
    return Source(train, _part(parts["validation"], inputs, target, []), tuple(notes))


def _part(files: list[Path], inputs: _Columns, target: _Columns | None, notes: list[str]) -> Part:
    arrow = need("pyarrow", f"{files[0]}: parquet")
    parquet = need("pyarrow.parquet", f"{files[0]}: parquet")
    _complete(files)
    with _readable(files[0], arrow):
        schema = parquet.ParquetFile(files[0]).schema_arrow
        _fits(files, parquet)
    chosen = _choose(files[0], schema, arrow.types, inputs, target, notes)
    columns, targets = ([schema.names[index] for index in side] for side in chosen)
    tables = []
    for file in files:
        with _readable(file, arrow):
            opened = parquet.ParquetFile(file)
            if missing := [name for name in columns + targets if name not in opened.schema_arrow.names]:
                raise DataError(f"{file}: no column {missing[0]}, which {files[0].name} has")
            tables.append(opened.read(columns=columns + targets))
    rows = Shards([(Rows(str(file)), len(table)) for file, table in zip(files, tables, strict=True)])
    with _readable(files[0].parent, arrow):
        table = arrow.concat_tables(tables)
    if not len(table):
        raise DataError(f"{files[0]}: holds no rows")
    for name in table.column_names:
        _no_nulls(table[name], name, rows)
    labels = [_labels(table[name], name, rows, arrow.types) for name in targets]
    classes = _classes(schema, targets[0]) if len(targets) == 1 else ()
    found: Labels = labels[0] if len(labels) == 1 else np.stack(labels, axis=1)
    if _is_image(schema.field(columns[0]).type, arrow.types):
        return Part(ImageBytes(_encoded(table[columns[0]], columns[0], rows), rows), found, classes)
    features = [_numbers(table[name], name, rows, arrow.types) for name in columns]
    values = np.stack(features, axis=1).astype(np.float32)
    return Part(Arrays(torch.from_numpy(values), rows), found, classes)


@contextmanager
def _readable(place: Path, arrow: Any) -> Iterator[None]:
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{place}: cannot be read as parquet ({why})") from error


def _complete(files: list[Path]) -> None:
    """Of 00000-of-00002 there are two."""
    if (match := re.search(r"-of-(\d+)\.parquet$", files[0].name)) and len(files) != int(match[1]):
        raise DataError(
            f"{files[0].parent}: {len(files)} of {int(match[1])} shards like {files[0].name} are there"
        )


def _fits(files: list[Path], parquet: Any) -> None:
    """More encoded bytes than the machine has memory would end the process without a word."""
    size = sum(
        group.total_byte_size
        for file in files
        for metadata in [parquet.read_metadata(file)]
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    )
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise DataError(
            f"{files[0].parent}: {size / 1e9:.1f} GB of data and {memory / 1e9:.1f} GB of memory; unpack the images into"
            " a folder of class folders, which is read as needed"
        )


def _choose(
    file: Path, schema: Any, types: Any, inputs: _Columns, target: _Columns | None, notes: list[str]
) -> tuple[list[int], list[int]]:
    images = [name for name in schema.names if _is_image(schema.field(name).type, types)]
    if images and not inputs:
        if len(images) > 1:
            raise DataError(f"{file}: columns {', '.join(images)} hold images; choose one by --inputs")
        inputs = images
    if target is None and images:
        classes = [name for name in schema.names if _classes(schema, name)]
        if len(classes) > 1:
            raise DataError(f"{file}: columns {', '.join(classes)} hold classes; choose one by --target")
        target = classes or None
    columns, targets, told = choose(str(file), schema.names, inputs, target)
    chosen = [schema.names[index] for index in columns]
    if set(chosen) & set(images) and len(chosen) > 1:
        raise DataError(f"{file}: images and other columns together as inputs; choose one column by --inputs")
    if set(chosen) & set(images):
        told.insert(0, f"inputs: images of column `{chosen[0]}`")
    notes += told
    return columns, targets


def _is_image(kind: Any, types: Any) -> bool:
    if types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _classes(schema: Any, name: str) -> tuple[str, ...]:
    """Names that Hugging Face datasets wrote into the schema for a ClassLabel column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[name]["names"] if features[name]["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _no_nulls(column: Any, name: str, rows: Shards) -> None:
    if column.null_count:
        missing = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
        raise DataError(f"{rows.place(missing)}, column `{name}`: no value; mend the row or remove it")


def _encoded(column: Any, name: str, rows: Shards) -> Any:
    """The binary column of the images."""
    if str(column.type).startswith("struct"):
        column = need("pyarrow.compute", "parquet").struct_field(column, "bytes")
        _no_nulls(column, f"{name}.bytes", rows)
    return column


def _labels(column: Any, name: str, rows: Shards, types: Any) -> Labels:
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind):
        strings: Labels = np.array(column.to_pylist(), np.str_)
        return strings
    return _numbers(column, name, rows, types)


def _numbers(column: Any, name: str, rows: Shards, types: Any) -> NDArray[Any]:
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise DataError(f"{rows.place(0)}, column `{name}`: {kind} is not a number; choose other columns")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int(np.isfinite(values).argmin())
        raise DataError(
            f"{rows.place(bad)}, column `{name}`: {values[bad]} is not finite; mend the row or remove it"
        )
    return values
