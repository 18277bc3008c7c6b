"""Tables in text: .csv, .tsv and .txt, one sample a line, with a header line or without.

Fields are divided by semicolons, tabs, commas or (as in the UCI sets) any white space, whichever the first line holds.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from reparam.errors import DataError
from reparam.training.data.columns import choose, shown
from reparam.training.data.parts import Arrays, Labels, Part, Rows, Source

SUFFIXES = (".csv", ".tsv", ".txt")
#: fields that only a header has
_SAID = ("label", "labels", "target", "targets", "class")


def read_text(path: Path, inputs: Sequence[str] | str, target: Sequence[str] | str | None) -> Source:
    """Read a table.

    Args:
        path: of the file, UTF-8.
        inputs, target: columns; see :func:`columns.choose`.

    Raises:
        DataError: no text, no rows, a row of another length, or a field that is missing or no finite number.
    """
    lines = _lines(path)
    head = list(islice(lines, 2))
    if not head:
        raise DataError(f"{path}: holds no rows")
    named = _is_header([line.fields for line in head])
    names = [field.strip() for field in head[0].fields] if named else [""] * len(head[0].fields)
    columns, targets, notes = choose(str(path), names, inputs, target)
    if not named:
        notes.insert(0, "no header line: columns are numbered from 0")

    values, labels, numbers = array("d"), list[list[str]](), array("q")
    for line in chain(head[named:], lines):
        if len(line.fields) != len(names):
            raise DataError(
                f"{path}: line {line.number} has {len(line.fields)} fields, line {head[0].number} has {len(names)}"
            )
        values.extend(_number(path, line, column, names) for column in columns)
        labels.append([_present(path, line, column, names) for column in targets])
        numbers.append(line.number)
    if not labels:
        raise DataError(f"{path}: holds a header and no rows")
    features = np.frombuffer(values, np.float64).reshape(len(labels), len(columns))
    places = Rows(str(path), "line", np.frombuffer(numbers, np.int64))
    return Source(
        Part(Arrays(torch.from_numpy(features.astype(np.float32)), places), parse_labels(labels)),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Line:
    number: int
    fields: list[str]


def _lines(path: Path) -> Iterator[_Line]:
    """Lines that are not blank, numbered from 1, cut into fields."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix == ".tsv" else next((d for d in ";\t," if d in first), None)
            # Tabs in a .txt are white space like any other: lines may end with one, or hold several.
            if delimiter is None or (delimiter == "\t" and path.suffix == ".txt"):
                for number, text in enumerate(file, 1):
                    if fields := text.split():
                        yield _Line(number, fields)
                return
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for fields in reader:
                if any(fields):
                    yield _Line(reader.line_num, fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _is_header(rows: list[list[str]]) -> bool:
    """The first line names columns if it says "label", has words where the second has numbers, or if neither has any
    number."""
    if any(field.strip().lower() in _SAID for field in rows[0]):
        return True
    numeric = [[_float(field) is not None for field in row] for row in rows]
    if len(rows) == 1 or not any(numeric[1]):
        return not any(numeric[0])
    return any(second and not first for first, second in zip(*numeric, strict=False))


def _number(path: Path, line: _Line, column: int, names: Sequence[str]) -> float:
    field = _present(path, line, column, names)
    value = _float(field)
    if value is None or not math.isfinite(value):
        what = "is not a number" if value is None else "is not finite"
        raise DataError(
            f"{path}: line {line.number}, column {shown(names, column)}: {field[:40]!r} {what};"
            " mend the line, or choose other columns by --inputs"
        )
    return value


def _present(path: Path, line: _Line, column: int, names: Sequence[str]) -> str:
    field = line.fields[column].strip()
    if not field:
        raise DataError(
            f"{path}: line {line.number}, column {shown(names, column)}: no value; mend the line or remove it"
        )
    return field


def _float(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def parse_labels(rows: Sequence[Sequence[str]]) -> Labels:
    """Target fields as integers if all are, else as floats if all are, else strings; (N,) or (N, K)."""
    for kind in (np.int64, np.float64):
        try:
            found: Labels = np.array([[kind(field) for field in row] for row in rows])
        except (ValueError, OverflowError):
            continue
        return found[:, 0] if found.shape[1] == 1 else found
    strings: Labels = np.array(rows)
    return strings[:, 0] if strings.shape[1] == 1 else strings
