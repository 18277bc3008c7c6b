"""What a training run tells, while it runs and at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step was taken.

    Attributes:
        step: from 1, over the whole run.
        steps: of the whole run.
        epoch: from 1.
        loss: mean over the batch, before the step.
        lr: learning rate of the first group that does not hold angles.
        samples_per_s: since the event before, of all ranks together.
        waiting: share of that time spent waiting for data, in [0, 1].
        eta_s: seconds to the last step at the pace of this process so far, evaluations included.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    samples_per_s: float
    waiting: float
    eta_s: float


@dataclass(frozen=True)
class Evaluation:
    """Loss and metric over the validation split, both means over its samples.

    Attributes:
        step: optimizer steps taken before it.
        metric: the metric's name.
        value: of the metric; shares in [0, 1].
    """

    step: int
    loss: float
    metric: str
    value: float


@dataclass(frozen=True)
class EvaluationEvent:
    """The validation split was evaluated: before the first step, after every epoch, and after the last step.

    Attributes:
        epoch: how many epochs ended or began before it; 0 before the first step.
        result: of the averaged weights, where the recipe asks for an average.
        train_loss: mean over the steps of the epoch; None before the first.
        best: the metric was never better.
    """

    epoch: int
    result: Evaluation
    train_loss: float | None
    best: bool


@dataclass(frozen=True)
class SavedEvent:
    """The state of ``step`` is on disk, and with it these files."""

    step: int
    files: tuple[Path, ...]


Event = StepEvent | EvaluationEvent | SavedEvent


@dataclass(frozen=True)
class TrainingResult:
    """How a run went.

    Attributes:
        before, best, last: evaluations: before the first step, the best, the latest.
        step: optimizer steps taken, in earlier parts of a resumed run too.
        interrupted: it was asked to stop, and can be resumed.
        stopped_early: it ended because the metric no longer improved.
        waiting: share of this process's training time spent waiting for data.
        samples_per_s: of all ranks together, evaluations and saves left out.
    """

    before: Evaluation
    best: Evaluation
    last: Evaluation
    step: int
    interrupted: bool
    stopped_early: bool
    waiting: float
    samples_per_s: float
