"""From labels as files hold them to targets: the task, the classes' names, and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reparam.errors import DataError
from reparam.training.data.parts import Arrays, Inputs, Labels, Part

#: integer targets beside numbers are taken for classes up to so many different ones
_FEW = 100
_MOST = 100_000
_LISTED = 8


@dataclass(frozen=True)
class Targets:
    """Targets of every part.

    Attributes:
        classes: names in label order; () for regression.
        width: number of classes, or K of float targets (N, K).
        tensors: int64 (N,) or float32 (N, K), a part each.
    """

    task: str
    classes: tuple[str, ...]
    width: int
    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """Inputs with their targets: a split."""

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.inputs.take(indices), self.targets[torch.as_tensor(indices, dtype=torch.int64)]

    def place(self, index: int) -> str:
        return self.inputs.place(index)


def encode(parts: Sequence[Part], task: str | None) -> Targets:
    """Settle the task and turn labels into targets.

    Args:
        parts: the training part first.
        task: "classify", "regress", or None to tell from the labels.

    Raises:
        DataError: a label that is no class or no number, negative, out of range, or that training lacks.
    """
    notes = []
    if task is None:
        task, why = _infer(parts)
        mend = (
            "" if "names" in why else "; --task regress takes them as numbers" if task == "classify" else ""
        )
        notes.append(f"task: {task}, as the targets are {why}{mend}")
    if task == "regress":
        values = [_values(part) for part in parts]
        widths = {value.shape[1] for value in values}
        if len(widths) > 1:
            raise DataError(f"targets differ in width: {' and '.join(map(str, sorted(widths)))}")
        return Targets(task, (), widths.pop(), tuple(map(torch.from_numpy, values)), tuple(notes))
    classes, labels = _classes(parts, notes)
    return Targets(task, classes, len(classes), tuple(map(torch.from_numpy, labels)), tuple(notes))


def _infer(parts: Sequence[Part]) -> tuple[str, str]:
    labels = np.concatenate([part.labels for part in parts]) if _alike(parts) else parts[0].labels
    if labels.ndim > 1:
        return "regress", f"{labels.shape[1]} columns"
    if parts[0].classes or labels.dtype.kind in "Ub":
        return "classify", "class names" if parts[0].classes or labels.dtype.kind == "U" else "true or false"
    if labels.dtype.kind == "f":
        return "regress", "numbers with a decimal point"
    distinct = len(np.unique(labels))
    numbers = isinstance(parts[0].inputs, Arrays) and parts[0].inputs.values.ndim == 2
    if numbers and distinct > _FEW:
        return "regress", f"{distinct} different integers"
    return "classify", f"{distinct} different integers"


def _alike(parts: Sequence[Part]) -> bool:
    return len({(part.labels.dtype.kind, part.labels.shape[1:]) for part in parts}) == 1


def _values(part: Part) -> NDArray[np.float32]:
    """(N, K) float32."""
    if part.classes:
        raise DataError(
            f"{part.inputs.place(0)}: has a class, not a value; --task regress needs numbers as targets"
        )
    if part.labels.dtype.kind == "U":
        strings = part.labels.reshape(len(part.labels), -1)
        index, value = next((i, v) for i, row in enumerate(strings) for v in row if not _is_number(v))
        raise DataError(f"{part.inputs.place(index)}: target {str(value)[:40]!r} is not a number")
    values = part.labels.astype(np.float32).reshape(len(part.labels), -1)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DataError(f"{part.inputs.place(int(finite.argmin()))}: the target is NaN or infinite")
    return values


def _classes(parts: Sequence[Part], notes: list[str]) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    if not _alike(parts):
        kinds = " and ".join(str(part.labels.dtype) for part in parts)
        raise DataError(f"labels of training and validation differ in kind: {kinds}")
    if parts[0].labels.ndim > 1:
        raise DataError(
            f"{parts[0].inputs.place(0)}: {parts[0].labels.shape[1]} targets for each sample; a class is one integer or"
            " name (--task regress takes several numbers)"
        )
    if parts[0].labels.dtype.kind == "U":
        classes = tuple(map(str, np.unique(parts[0].labels)))
        return classes, [_looked_up(part, part.labels, classes) for part in parts]
    labels = [_integers(part) for part in parts]
    classes = parts[0].classes or tuple(map(str, range(max(int(found.max()) for found in labels) + 1)))
    # A part may name fewer classes, or number them in another way.
    labels = [
        _looked_up(part, np.array(part.classes)[found], classes)
        if part.classes not in ((), classes)
        else found
        for part, found in zip(parts, labels, strict=True)
    ]
    if absent := sorted(set(range(len(classes))) - set(np.unique(labels[0]).tolist())):
        notes.append(
            f"classes: none of the training samples is {_listing([classes[label] for label in absent])}"
        )
    return classes, labels


def _looked_up(part: Part, names: Labels, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """The places that the names of a part's labels have in ``classes``."""
    known = np.isin(names, classes)
    if not known.all():
        index = int(known.argmin())
        raise DataError(
            f"{part.inputs.place(index)}: class {str(names[index])[:40]!r} is unknown to training ({_listing(classes)})"
        )
    order = np.argsort(classes)
    return order[np.searchsorted(classes, names, sorter=order)].astype(np.int64)


def _integers(part: Part) -> NDArray[np.int64]:
    labels = part.labels.astype(np.float64)
    for bad, what in (
        (labels != np.round(labels), "is no integer, as a class has to be"),
        (labels < 0, "is negative; classes count from 0 (-1 often says: not labelled)"),
        (labels >= _MOST, f"is too large for a class index (from 0, below {_MOST:,})"),
    ):
        if bad.any():
            index = int(bad.argmax())
            raise DataError(
                f"{part.inputs.place(index)}: label {part.labels[index]} {what}; --task regress takes numbers"
            )
    if part.classes and labels.max() >= len(part.classes):
        index = int(labels.argmax())
        raise DataError(
            f"{part.inputs.place(index)}: label {part.labels[index]} is out of range; {len(part.classes)} classes have"
            f" names ({_listing(part.classes)})"
        )
    return part.labels.astype(np.int64)


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
