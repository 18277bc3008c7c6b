"""Rates and early stop over whole runs, whose evaluations are given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import CLASSES, Held, geometric, labelled, recipe, trained

from reparam.training import EvaluationEvent, StepEvent
from reparam.training.data.types import Data


class Scripted(nn.Module):
    """A network whose validation accuracy after each epoch is given."""

    def __init__(self, accuracies: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES))
        self.accuracies = accuracies
        self.evaluation = -2  # the preflight comes before the first

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.weight
        self.evaluation += 1
        right = round(10 * self.accuracies[max(self.evaluation, 0)])
        labels = x[:, 0].long()
        labels[right:] = (labels[right:] + 1) % 3
        return F.one_hot(labels, CLASSES).float() + 0 * self.weight


def scripted() -> Data:
    """Ten samples of each split whose inputs hold their label: one batch, one step an epoch."""
    labels = torch.arange(10) % 3
    inputs = labels[:, None].repeat(1, 3).float()
    split = Held(inputs, labels)
    return Data(split, split, "classify", tuple("abc"), 3, (3,), (), (), ())


def test_plateau_lowers_the_rates_when_the_metric_no_longer_improves(tmp_path: Path) -> None:
    #           before  after each epoch; no improvement in epochs 3, 4 | 6, 7
    accuracies = [0.9, 0.2, 0.4, 0.3, 0.4, 0.5, 0.5, 0.1, 0.1]
    told: list[Any] = []
    chosen = recipe(epochs=8, batch_size=10, schedule="plateau", patience=2, factor=0.5, lr=0.8)
    result = trained(Scripted(accuracies), scripted(), chosen, tmp_path / "run", tell=told.append)
    assert [event.result.value for event in told if isinstance(event, EvaluationEvent)] == accuracies
    assert [event.lr for event in told if isinstance(event, StepEvent)] == [0.8] * 4 + [0.4] * 3 + [0.2]
    assert (result.before.value, result.best.value, result.best.step, result.last.value) == (0.9, 0.9, 0, 0.1)


def test_early_stop_counts_epochs_without_improvement(tmp_path: Path) -> None:
    accuracies = [0.1, 0.2, 0.4, 0.3, 0.4, 0.5, 0.5, 0.1, 0.1, 0.9]
    result = trained(
        Scripted(accuracies), scripted(), recipe(epochs=9, batch_size=10, early_stop=3), tmp_path / "run"
    )
    assert (result.stopped_early, result.step, result.best.step) == (True, 8, 5)
    again = trained(
        Scripted(accuracies),
        scripted(),
        recipe(epochs=9, batch_size=10, early_stop=3),
        tmp_path / "run",
        resumed=True,
    )
    assert (again.stopped_early, again.step) == (True, 8)
    more = trained(
        Scripted([0.9, 0.9]),
        scripted(),
        recipe(epochs=9, batch_size=10, early_stop=4),
        tmp_path / "run",
        resumed=True,
    )
    assert (more.stopped_early, more.step, more.best.step) == (False, 9, 9)


def test_warm_up_and_cosine_over_all_steps(tmp_path: Path) -> None:
    told: list[Any] = []
    chosen = recipe(epochs=2, schedule="cosine", warmup=2, min_lr=0.01, lr=0.1, angle_lr=0.04)
    trained(geometric(), labelled(), chosen, tmp_path / "run", tell=told.append)
    rates = [event.lr for event in told if isinstance(event, StepEvent)]
    cosine = [0.01 + 0.09 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, *cosine], rel=1e-12)
