"""All that a resumed run needs, in one file of plain values and tensors.

The order of the data, augmentation and dropout are functions of seed and step: the step is all there is to know of them.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reparam.checkpoint.staging import staged
from reparam.errors import CheckpointError, DataError, ReparamError, first_line
from reparam.training.events import Evaluation
from reparam.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from reparam.training.data.types import Data

_FORMAT = 1
#: a run may be resumed with others: they do not change what a step computes, or only where the run ends
_MAY_CHANGE = frozenset(
    {"epochs", "steps", "early_stop", "compile", "device", "workers", "save_every", "keep"}
)
#: unless its learning rates depend on where the run ends
_ENDS = frozenset({"epochs", "steps"})


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        loss_sum, loss_count: of the steps since the last evaluation.
        before, best, last: evaluations: the first, the best and the latest.
        stopped: early stopping ended the run.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    before: Evaluation | None = None
    best: Evaluation | None = None
    last: Evaluation | None = None
    stopped: bool = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Progress:
        """What ``state_dict`` gave."""
        evaluations = {key: Evaluation(**state[key]) for key in ("before", "best", "last") if state[key]}
        return cls(**{**state, **evaluations})


@dataclass(frozen=True)
class State:
    """One moment of a run, between two steps.

    Attributes:
        recipe, data: the recipe's fields and what was known of the data, to see that the same run goes on.
        progress: see ``Progress``.
        model, optimizer, schedule, early_stop, average, scaler: their state_dicts; {} where a run has none.
        metrics: bytes of the metrics files.
        file: where it was read from.
    """

    recipe: dict[str, Any]
    data: dict[str, Any]
    progress: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    early_stop: dict[str, Any]
    average: dict[str, Any]
    scaler: dict[str, Any]
    metrics: dict[str, int]
    file: Path = field(default=Path("state.pt"), compare=False)

    def save(self, file: Path) -> None:
        """Write it, whole or not at all, over what is there.

        Raises:
            OutputError: the place cannot be written, or is full.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "file"}
        with staged(file, force=True) as temporary, temporary.open("wb") as raw:
            torch.save({"format": _FORMAT, **values}, raw)
            raw.flush()
            os.fsync(raw.fileno())

    @classmethod
    def load(cls, file: Path) -> State:
        """Read one; nothing in it is run.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file: nothing to resume in {file.parent}; a run that was cut off before it first saved "
                "starts again with --force"
            )
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's and pickle's, of many kinds
            why = first_line(error)
            raise CheckpointError(f"{file}: cannot be read ({why}): start again with --force") from error
        names = {f.name for f in fields(cls)} - {"file"}
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT or found.keys() != names:
            raise CheckpointError(f"{file}: not the state of a run of this release: start again with --force")
        return cls(**found, file=file)

    def check(self, recipe: Recipe, data: Data) -> None:
        """See that going on with ``recipe`` and ``data`` is the same run.

        Raises:
            ReparamError: a field of the recipe differs that changes what a step computes.
            DataError: the data differs in size, shape or classes.
        """
        fixed = _ENDS if recipe.schedule == "cosine" else frozenset()
        for name, value in recipe.model_dump(mode="json").items():
            before = self.recipe.get(name)
            if value != before and (name in fixed or name not in _MAY_CHANGE):
                option = f"--{name.replace('_', '-')}"
                raise ReparamError(
                    f"{self.file}: the run has {option} {before}, not {value}: it can only go on as it began"
                )
        for name, now in described(data).items():
            if now != self.data.get(name):
                before = reprlib.repr(self.data.get(name))
                raise DataError(
                    f"{self.file}: the run's data has {name} {before}, this has {reprlib.repr(now)}"
                )


def described(data: Data) -> dict[str, Any]:
    """What is compared to tell one dataset from another."""
    return {
        "task": data.task,
        "classes": list(data.classes),
        "targets": data.targets,
        "shape": list(data.shape),
        "training samples": len(data.train),
        "validation samples": len(data.validation),
        "mean": list(data.mean),
        "deviation": list(data.std),
        "samples": _fingerprint(data),
    }


def _fingerprint(data: Data) -> str:
    """A hash of the first, the middle and the last sample of both parts."""
    found = hashlib.sha256()
    for part in (data.train, data.validation):
        for index in sorted({0, len(part) // 2, len(part) - 1}):
            for tensor in part.take([index]):
                found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
