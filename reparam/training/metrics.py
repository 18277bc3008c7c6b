"""metrics.jsonl and metrics.csv of a run, cut back to what a resumed run's state has seen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from reparam.errors import OutputError
from reparam.training.events import EvaluationEvent, StepEvent
from reparam.training.run_folder import RunFolder


class Metrics:
    """Appends lines, each written at once.

    Args:
        run: where.
        sizes: bytes of the two files by name, as ``sizes`` gave them when the state was saved; what lies behind is
            cut off. {} for a new run.
    """

    def __init__(self, run: RunFolder, sizes: Mapping[str, int]) -> None:
        self._files = {path.name: path for path in (run.metrics, run.table)}
        for name, path in self._files.items():
            size = sizes.get(name, 0)
            try:
                if path.exists() and path.stat().st_size > size:
                    os.truncate(path, size)
            except OSError as error:
                raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        self._lines, self._table = run.metrics, run.table

    def step(self, event: StepEvent) -> None:
        """One line: step, epoch, loss, lr, samples_per_s, waiting."""
        line = {
            "step": event.step,
            "epoch": event.epoch,
            "loss": event.loss,
            "lr": event.lr,
            "samples_per_s": round(event.samples_per_s, 1),
            "waiting": round(event.waiting, 4),
        }
        _append(self._lines, json.dumps(line) + "\n")

    def evaluation(self, event: EvaluationEvent) -> None:
        """One line in each file: epoch, step, train_loss, validation_loss, the metric under its name, best."""
        result = event.result
        line = {
            "epoch": event.epoch,
            "step": result.step,
            "train_loss": event.train_loss,
            "validation_loss": result.loss,
            result.metric: result.value,
            "best": event.best,
        }
        _append(self._lines, json.dumps(line) + "\n")
        if not self._table.exists() or not self._table.stat().st_size:
            _append(self._table, ",".join(line) + "\n")
        _append(self._table, ",".join("" if value is None else str(value) for value in line.values()) + "\n")

    def sizes(self) -> dict[str, int]:
        """Bytes of the two files, all of them on disk."""
        found = {}
        for name, path in self._files.items():
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                found[name] = path.stat().st_size
        return found


def _append(path: Path, text: str) -> None:
    try:
        with path.open("ab", buffering=0) as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
