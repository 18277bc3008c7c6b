"""How fast a run is, and how much of the time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Pace:
    """Measures laps, one a step; what lies between ``pause`` and the next batch is in none."""

    def __init__(self) -> None:
        self._began = self._lap = time.perf_counter()
        self._waiting = 0.0
        self._steps = self._samples = 0
        self._seconds = self._waited = 0.0

    def pause(self) -> None:
        """What comes now, an evaluation or a save, is no training."""
        self._lap, self._waiting = time.perf_counter(), 0.0

    def wait(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; the time they take to come is waited for."""
        self.pause()
        iterator, done = iter(batches), object()
        while True:
            began = time.perf_counter()
            item = next(iterator, done)
            self._waiting += time.perf_counter() - began
            if item is done:
                return
            yield item  # type: ignore[misc]

    def lap(self, samples: int, steps_left: int) -> tuple[float, float, float]:
        """A step ended: its samples per second, its share of waiting, and the seconds to the last step."""
        now = time.perf_counter()
        seconds, waiting = max(now - self._lap, 1e-9), self._waiting
        self._steps, self._samples = self._steps + 1, self._samples + samples
        self._seconds, self._waited = self._seconds + seconds, self._waited + waiting
        self._lap, self._waiting = now, 0.0
        return samples / seconds, min(waiting / seconds, 1.0), (now - self._began) / self._steps * steps_left

    def summary(self) -> tuple[float, float]:
        """Share of all laps spent waiting, and samples per second over all of them; 0 without laps."""
        seconds = max(self._seconds, 1e-9)
        return min(self._waited / seconds, 1.0), self._samples / seconds
