"""Losses and metrics by formula, and recipes that do not fit the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_cases import SAME, labelled, measured, plain, recipe, trained

from reparam.errors import ReparamError
from reparam.training.data.types import Data
from reparam.training.objective import Objective


def test_losses_and_metrics_by_formula(tmp_path: Path) -> None:
    """Against one line of torch each, on outputs wider than the classes too."""
    logits, labels = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 7
    classes, numbers = labelled(), measured(width=5)
    smooth = Objective.of(recipe(label_smoothing=0.1), classes)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none").sum()
    torch.testing.assert_close(smooth.loss_sum(logits, labels), expected)
    top5 = Objective("classify", "cross_entropy", "top5", 7)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert top5.metric_sum(logits, labels) == (ranks < 5).sum()
    outputs, target = logits[:, :5], torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    error = outputs.double() - target.double()
    for loss, mean in (
        ("mse", error.square()),
        ("mae", error.abs()),
        ("huber", F.huber_loss(outputs, target, reduction="none")),
    ):
        of_values = Objective.of(recipe(loss=loss), numbers)
        torch.testing.assert_close(of_values.loss_sum(outputs, target), mean.mean(1).sum().float())
    for metric, mean in (("rmse", error.square().mean().sqrt()), ("mae", error.abs().mean())):
        of_values = Objective.of(recipe(metric=metric), numbers)
        found = of_values.metric_of(float(of_values.metric_sum(outputs, target)), 9)
        assert found == pytest.approx(float(mean), rel=SAME)


@pytest.mark.parametrize(
    ("data", "fields", "told"),
    [
        (labelled(), {"task": "regress"}, "--task regress: the data is of the task classify"),
        (labelled(), {"loss": "mse"}, "--loss mse does not fit task classify: use cross_entropy"),
        (measured(), {"metric": "top5"}, "--metric top5 does not fit task regress: use rmse or mae"),
        (measured(), {"label_smoothing": 0.1}, "--label-smoothing does not fit task regress"),
        (labelled(), {"metric": "top5"}, "--metric top5 says nothing of 3 classes"),
        (
            labelled(),
            {"amp": "fp16", "device": "auto"},
            "--amp fp16 needs a GPU, this run is on cpu: use --amp bf16",
        ),
        (
            labelled(),
            {"batch_size": 100, "accumulate": 23},
            "a batch of 22 samples on 1 device(s) has not so many parts",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_data(
    data: Data, fields: dict[str, Any], told: str, tmp_path: Path
) -> None:
    if torch.cuda.is_available() and "amp" in fields:
        pytest.skip("there is a GPU")
    with pytest.raises(ReparamError) as caught:
        trained(plain(), data, recipe(**fields), tmp_path / "run")
    assert told in str(caught.value)
