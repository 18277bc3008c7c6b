"""A Dataset of the user's own: ``path/to/file.py:callable`` returns it, or a pair (train, validation).

It is a map-style torch Dataset: ``len(dataset)`` and ``dataset[i]`` = (input, target). Only what the user names is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reparam.errors import ArchitectureError, DataError
from reparam.graph.arch import call_reference, told
from reparam.training.data.types import Samples

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True)
class OwnSamples:
    """Items of a user's dataset.

    Attributes:
        where: reference and part, for messages.
        classes: how many labels there may be; None for regression or while they are counted.
        random: it may draw random numbers as it is read, so that each reading gets its own seed.
    """

    dataset: Any
    where: str
    task: str
    classes: int | None = None
    random: bool = True

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = joined(self, indices or [0], [self._item(index) for index in indices or [0]])
        return inputs[: len(indices)], targets[: len(indices)]

    def place(self, index: int) -> str:
        return f"{self.where}[{index}]"

    def _item(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            item = self.dataset[index]
        except Exception as error:  # code of the user's
            raise DataError(f"{self.place(index)} raised {told(error)}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"{self.place(index)} is {_described(item)}; expected (input, target): a tuple of two"
            )
        return self._input(index, item[0])[None], self._target(index, item[1])[None]

    def _input(self, index: int, value: Any) -> Tensor:
        picture = hasattr(value, "getbands")  # Pillow's, as from torchvision without a transform
        tensor = self._tensor(index, np.array(value) if picture else value, "input")
        if picture:
            tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
        if tensor.ndim == 0:
            tensor = tensor[None]
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise DataError(f"{self.place(index)}: the input holds NaN or Inf")
            return tensor.float()
        # Bytes in the shape of an image are pixels; other integers are numbers or tokens.
        return tensor if tensor.dtype == torch.uint8 and tensor.ndim == 3 else tensor.long()

    def _target(self, index: int, value: Any) -> Tensor:
        tensor = self._tensor(index, value, "target")
        if self.task == "regress":
            if tensor.ndim > 1 or not torch.isfinite(tensor).all():
                raise DataError(
                    f"{self.place(index)}: the target is {_kind(tensor)}; expected a finite number, or a vector of them"
                )
            return tensor.float().reshape(-1)
        if tensor.numel() != 1 or tensor.dtype not in _INTEGERS:
            raise DataError(
                f"{self.place(index)}: the target is {_kind(tensor)}; a label is an integer (--task regress takes numbers)"
            )
        label = int(tensor)
        if label < 0 or (self.classes is not None and label >= self.classes):
            allowed = "from 0 up" if self.classes is None else f"0 to {self.classes - 1}"
            raise DataError(f"{self.place(index)}: label {label} is out of range ({allowed})")
        return tensor.long().reshape(())

    def _tensor(self, index: int, value: Any, what: str) -> Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.place(index)}: the {what} is {_described(value)}; expected numbers"
            ) from error


def joined(
    samples: Samples, indices: Sequence[int], items: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """One batch of batches of one.

    Raises:
        DataError: their shapes or types differ.
    """
    for side, what in ((0, "input"), (1, "target")):
        first = items[0][side]
        for index, item in zip(indices, items, strict=True):
            if (item[side].shape, item[side].dtype) != (first.shape, first.dtype):
                raise DataError(
                    f"{samples.place(index)}: the {what} is {_kind(item[side][0])}, that of {samples.place(indices[0])}"
                    f" {_kind(first[0])}; all have to be alike"
                )
    inputs, targets = (torch.cat(side) for side in zip(*items, strict=True))
    return inputs, targets


@dataclass(frozen=True)
class Own:
    """What a reference returned.

    Attributes:
        classes: names in label order; () for regression.
        labels: of the training part, if they were counted.
    """

    train: OwnSamples
    validation: OwnSamples | None
    task: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64] | None
    notes: tuple[str, ...]


def read_own(ref: str, task: str | None) -> Own:
    """Call ``path/to/file.py:callable`` and look at what it returns.

    Raises:
        DataError: the reference leads nowhere, the callable raised, or what it returned is no such dataset.
    """
    try:
        returned = call_reference(ref, "--data", {})
    except ArchitectureError as error:
        raise DataError(str(error)) from error
    # A list is a dataset itself.
    sets = list(returned) if isinstance(returned, tuple) and len(returned) == 2 else [returned]
    pair = len(sets) == 2
    for dataset in sets:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(
            dataset, (dict, str)
        ):
            raise DataError(
                f"--data {ref} returned {_described(returned)}; expected a Dataset with __len__ and __getitem__, or a"
                " pair (train, validation) of them"
            )
        if not len(dataset):
            raise DataError(f"--data {ref} returned a dataset without items")
    where = [f"{ref}: {part}" if pair else ref for part in ("train", "validation")]
    notes: list[str] = []
    if task is None:
        task = _task(sets[0], where[0])
        notes.append(
            f"task: {task}, as the first target is {'an integer' if task == 'classify' else 'no integer'}"
        )
    parts = [OwnSamples(dataset, place, task) for dataset, place in zip(sets, where, strict=False)]
    if task == "regress":
        return Own(parts[0], parts[1] if pair else None, task, (), None, tuple(notes))
    names = getattr(sets[0], "classes", None)
    labels = None
    if isinstance(names, (list, tuple)) and names:
        classes = tuple(map(str, names))
    else:
        counted = [_labels(part) for part in parts]
        labels = counted[0]
        classes = tuple(map(str, range(1 + max(int(found.max()) for found in counted))))
        notes.append(
            f"classes: {len(classes)}, found by reading all {sum(map(len, parts))} items; `classes`, a list of names on"
            " the dataset, saves that"
        )
    parts = [OwnSamples(part.dataset, part.where, task, len(classes)) for part in parts]
    return Own(parts[0], parts[1] if pair else None, task, classes, labels, tuple(notes))


def _task(dataset: Any, where: str) -> str:
    _, target = OwnSamples(dataset, where, "regress").take([0])
    value = dataset[0][1]
    integer = target.numel() == 1 and torch.as_tensor(value).dtype in _INTEGERS
    return "classify" if integer else "regress"


def _labels(samples: OwnSamples) -> NDArray[np.int64]:
    return np.array([int(samples.take([index])[1]) for index in range(len(samples))], np.int64)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _described(value: object) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
