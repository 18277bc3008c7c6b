"""How learning rates change while training, and when to stop: pure functions of the step and of the values observed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

Better = Literal["lower", "higher"]


@dataclass
class Schedule:
    """Learning rates by step, the same factor for every parameter group.

        warm-up     (step + 1) / (warmup + 1)           while step < warmup, whatever the kind
        constant    1
        cosine      ½·(1 + cos π·(step − warmup)/(total_steps − warmup)), between the group's rate and min_lr
        plateau     ``factor`` to the number of times the observed value was not better for ``patience`` epochs

    ``min_lr`` is an absolute rate, as in torch's schedulers; a group whose own rate is lower stays at its own.

    Attributes:
        kind: "constant", "cosine" or "plateau".
        total_steps: optimizer steps of the whole run.
        warmup: optimizer steps of the warm-up.
        patience: epochs (plateau).
        better: whether lower or higher values are (plateau).
    """

    kind: Literal["constant", "cosine", "plateau"]
    total_steps: int
    warmup: int = 0
    min_lr: float = 0.0
    patience: int = 50
    factor: float = 0.1
    better: Better = "lower"

    def __post_init__(self) -> None:
        self._waiting = _Waiting(self.better)
        self._drops = 0

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the rates of one step, counted from 0, before it is taken.

        A group's own rate is kept in its "initial_lr" the first time, and so in the optimizer's state.
        """
        for group in optimizer.param_groups:
            group["lr"] = self.rate(group.setdefault("initial_lr", group["lr"]), step)

    def rate(self, initial: float, step: int) -> float:
        """The rate at a step of a group whose own rate is ``initial``."""
        if step < self.warmup:
            return initial * (step + 1) / (self.warmup + 1)
        lowest = min(self.min_lr, initial)
        if self.kind == "cosine":
            done = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
            return lowest + (initial - lowest) * (1 + math.cos(math.pi * done)) / 2
        if self.kind == "plateau":
            return max(lowest, initial * self.factor**self._drops)
        return initial

    def observe(self, value: float) -> None:
        """Take notice of the value (loss or metric) of an epoch that ended; plateau looks at it."""
        if self._waiting.observe(value) >= self.patience:
            self._drops += 1
            self._waiting.epochs = 0

    def state_dict(self) -> dict[str, Any]:
        return {"drops": self._drops, **self._waiting.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drops = state["drops"]
        self._waiting.load_state_dict(state)


class EarlyStop:
    """Stop when a value was not better for ``patience`` epochs.

    Args:
        patience: epochs; None never stops.
        better: whether lower or higher values are.
    """

    def __init__(self, patience: int | None, better: Better = "lower") -> None:
        self.patience = patience
        self._waiting = _Waiting(better)

    def observe(self, value: float) -> bool:
        """Whether to stop after the epoch that ended with ``value``."""
        epochs = self._waiting.observe(value)
        return self.patience is not None and epochs >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return self._waiting.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting.load_state_dict(state)


class _Waiting:
    """The best value so far, and for how many epochs none was better; NaN never is."""

    def __init__(self, better: Better) -> None:
        self.sign = 1.0 if better == "higher" else -1.0
        self.best: float | None = None
        self.epochs = 0

    def observe(self, value: float) -> int:
        if not math.isnan(value) and (self.best is None or self.sign * value > self.sign * self.best):
            self.best, self.epochs = value, 0
        else:
            self.epochs += 1
        return self.epochs

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.epochs = state["best"], state["epochs"]
