"""What a run leaves on disk: its state first, then the weights; see ``run_folder``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from reparam.graph import records_of
from reparam.training.course import Course
from reparam.training.events import SavedEvent
from reparam.training.metrics import Metrics
from reparam.training.recipe import Recipe
from reparam.training.run_folder import RunFolder
from reparam.training.state import State

if TYPE_CHECKING:
    from reparam.training.data.types import Data

#: what a file holds of a model
StateOf = Callable[[nn.Module], Mapping[str, Tensor]]


class Saver:
    """Writes into a run folder, on the one rank that does.

    Args:
        state_of: the model's state_dict without.
    """

    def __init__(
        self, run: RunFolder, course: Course, recipe: Recipe, data: Data, state_of: StateOf | None
    ) -> None:
        self._run, self._course, self._recipe, self._data = run, course, recipe, data
        self._state_of = state_of or (lambda model: model.state_dict())
        self._records = records_of(course.model)
        self._last: int | None = None

    def begin(self, resume: State | None) -> None:
        """Open the metrics; weights that a killed run had not written any more are those of its state."""
        self.metrics = Metrics(self._run, {} if resume is None else resume.metrics)
        if resume is not None:
            self._write_weights()

    def save(self) -> SavedEvent:
        """Write the state of now, and the weights, which set those of the save before aside.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        step = self._course.progress.step
        if self._last is not None and self._last != step:
            self._run.set_aside(self._last, self._recipe.keep)
        self._course.state(self._recipe, self._data, self.metrics.sizes()).save(self._run.state)
        return SavedEvent(step, (self._run.state, *self._write_weights()))

    def _write_weights(self) -> list[Path]:
        done = self._course.progress
        files = [self._run.last]
        if done.best is not None and done.best.step == done.step:
            files.append(self._run.best)
        with self._course.averaged():
            tensors = self._state_of(self._course.model)
            for file in files:
                self._run.save_weights(file, tensors, self._records)
        self._last = done.step
        return files
