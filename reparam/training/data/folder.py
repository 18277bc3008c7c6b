"""Folders of images: a folder for each class, or any images with a metadata.csv or metadata.jsonl (Hugging Face's imagefolder).

DATA/train/cat/7.png    DATA/val/cat/8.png      parts (val, valid, validation or test), class folders
DATA/cat/7.png                                  one part
DATA/7.png  DATA/metadata.csv                   file_name,label: instead of class folders, in either place
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from reparam.errors import DataError
from reparam.training.data.columns import choose
from reparam.training.data.images import ImageFiles
from reparam.training.data.parts import Part, Source
from reparam.training.data.text import parse_labels

METADATA = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"
_VALIDATION = ("val", "valid", "validation", "test")
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def holds_images(folder: Path) -> bool:
    """Whether a folder has metadata or subfolders."""
    return _metadata(folder) is not None or bool(_subfolders(folder))


def read_folder(folder: Path, target: Sequence[str] | str | None) -> Source:
    """Find the images of a folder and their labels; no image is opened.

    Args:
        target: column of the metadata; "label" or the only one beside file_name without.

    Raises:
        DataError: a class folder without images, or metadata that cannot be read or name no file.
    """
    notes: list[str] = []
    parts = [name for name in ("train", *_VALIDATION) if _is_part(folder / name)]
    if "train" not in parts:
        return Source(_part(folder, target, notes), None, tuple(notes))
    train = _part(folder / "train", target, notes)
    if len(parts) == 1:
        return Source(train, None, tuple(notes))
    notes.append(f"validation: {parts[1]}/" + "".join(f"; {name}/ is left out" for name in parts[2:]))
    validation = _part(folder / parts[1], target, notes)
    return Source(train, validation, tuple(notes))


def _is_part(folder: Path) -> bool:
    """A part holds class folders or metadata; a folder that holds images themselves is a class of that name."""
    return folder.is_dir() and holds_images(folder)


def _part(folder: Path, target: Sequence[str] | str | None, notes: list[str]) -> Part:
    if metadata := _metadata(folder):
        return _described(folder, metadata, target, notes)
    if target:
        raise DataError(f"--target {target}: is a column of metadata.csv; {folder} has class folders only")
    classes = tuple(_subfolders(folder))
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        found, left = _images(folder, name)
        if not found:
            raise DataError(f"{folder / name}: a class folder without images; fill it or remove it")
        files += found
        labels += [label] * len(found)
        others += left
    if others:
        notes.append(f"{folder}: left out, as no images by their names: {len(others)} files ({others[0]})")
    return Part(ImageFiles(folder, files), np.array(labels, np.int64), classes)


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _images(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Images and other files at any depth below a class folder, relative to ``folder``, sorted."""
    found: list[str] = []
    for place, below, files in os.walk(folder / name):
        below[:] = sorted(entry for entry in below if not entry.startswith("."))
        relative = Path(place).relative_to(folder)
        found += [str(relative / file) for file in sorted(files) if not file.startswith(".")]
    return (
        [file for file in found if file.lower().endswith(_IMAGES)],
        [file for file in found if not file.lower().endswith(_IMAGES)],
    )


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _described(folder: Path, metadata: Path, target: Sequence[str] | str | None, notes: list[str]) -> Part:
    """Images that ``metadata`` lists, with their labels."""
    rows = list(_csv_rows(metadata) if metadata.suffix == ".csv" else _json_rows(metadata))
    if not rows:
        raise DataError(f"{metadata}: lists no images")
    names = list(rows[0][1])
    if _FILE_NAME not in names:
        raise DataError(f"{metadata}: no column {_FILE_NAME}; there are {', '.join(names)}")
    _, chosen, told = choose(str(metadata), names, [_FILE_NAME], target)
    notes += told
    columns = [names[index] for index in chosen]
    files, labels = [], []
    for line, row in rows:
        if missing := [name for name in (_FILE_NAME, *columns) if row.get(name) in (None, "")]:
            raise DataError(
                f"{metadata}: line {line}, column `{missing[0]}`: no value; mend the line or remove it"
            )
        file = str(row[_FILE_NAME])
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise DataError(f"{metadata}: line {line}: {file} lies outside of the folder")
        if not (folder / file).is_file():
            raise DataError(f"{metadata}: line {line}: no such file: {file}")
        files.append(file)
        values = [row[name] for name in columns]
        if not all(isinstance(value, (str, int, float)) for value in values):
            raise DataError(
                f"{metadata}: line {line}: the target is no number or string; choose a column by --target"
            )
        labels.append([str(value) for value in values])
    return Part(ImageFiles(folder, files), parse_labels(labels))


def _csv_rows(metadata: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        with metadata.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{metadata}: line {reader.line_num} has not the {len(reader.fieldnames or ())} fields of the header"
                    )
                yield reader.line_num, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{metadata}: no UTF-8 table ({error})") from error


def _json_rows(metadata: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        text = metadata.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{metadata}: not UTF-8 text (byte {error.start})") from error
    for line, entry in enumerate(text.splitlines(), 1):
        if not entry.strip():
            continue
        try:
            row = json.loads(entry)
        except ValueError as error:
            raise DataError(f"{metadata}: line {line}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{metadata}: line {line}: not an object {{...}}")
        yield line, row
