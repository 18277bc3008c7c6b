"""The training loop against loops written out in plain torch; what it tells and writes of its steps."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tensors_of
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import SAME, geometric, labelled, measured, plain, recipe, trained, values

from reparam.training import EvaluationEvent, RunFolder, SavedEvent, StepEvent
from reparam.training.data.loader import Batches
from reparam.training.data.types import Data
from reparam.training.recipe import Recipe


def steps_of(data: Data, chosen: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of every step, in order."""
    batches = Batches(data, data.train, batch_size=chosen.batch_size, shuffle=True, seed=chosen.seed)
    for epoch in range(chosen.epochs):
        for inputs, targets in batches.epoch(epoch):
            yield inputs.double(), targets


def by_hand(model: nn.Module, data: Data, chosen: Recipe) -> tuple[list[float], dict[str, Tensor], list[Any]]:
    """Plain SGD with momentum and torch's own losses: losses, moving averages, validation after every epoch."""
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=chosen.lr, momentum=chosen.momentum)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    lossy: Any = F.cross_entropy if data.task == "classify" else F.mse_loss
    losses, evaluations = [], []
    for step, (inputs, targets) in enumerate(steps_of(data, chosen)):
        loss = lossy(model(inputs), targets if data.task == "classify" else targets.double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        decay = min(chosen.ema or 0.0, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        if (step + 1) % 5 == 0:
            held = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.eval()
            with torch.no_grad():
                if chosen.ema is not None:
                    for name, parameter in model.named_parameters():
                        parameter.copy_(average[name])
                inputs, targets = data.validation.take(range(len(data.validation)))
                outputs = model(inputs.double())
                if data.task == "classify":
                    evaluations.append(
                        (
                            lossy(outputs, targets).item(),
                            (outputs.argmax(1) == targets).double().mean().item(),
                        )
                    )
                else:
                    mean = lossy(outputs, targets.double()).item()
                    evaluations.append((mean, math.sqrt(mean)))
                for name, parameter in model.named_parameters():
                    parameter.copy_(held[name])
            model.train()
    return losses, average, evaluations


@pytest.mark.parametrize("make", [labelled, measured])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_weights_losses_metrics_and_averages_are_those_of_a_loop_by_hand(
    make: Callable[[], Data], ema: float | None, tmp_path: Path
) -> None:
    data, chosen = make(), recipe(dtype="float64", ema=ema)
    ours, theirs, told = plain(data.targets), plain(data.targets), []
    result = trained(ours, data, chosen, tmp_path / "run", tell=told.append)
    losses, average, evaluations = by_hand(theirs, data, chosen)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=SAME, atol=SAME)
    assert [event.loss for event in told if isinstance(event, StepEvent)] == pytest.approx(losses, rel=SAME)
    after = [event.result for event in told if isinstance(event, EvaluationEvent)][1:]
    assert [one.loss for one in after] == pytest.approx([loss for loss, _ in evaluations], rel=SAME)
    assert [one.value for one in after] == pytest.approx([metric for _, metric in evaluations], rel=SAME)
    assert result.last == after[-1]
    saved = tensors_of(tmp_path / "run" / "last.safetensors")
    expected = average if ema is not None else dict(theirs.named_parameters())
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=SAME, atol=SAME)
    assert not ours.training


@pytest.mark.parametrize(("train", "batch_size", "parts"), [(22, 4, 2), (21, 7, 3), (20, 7, 4), (5, 8, 2)])
def test_parts_of_a_batch_add_up_to_its_mean(train: int, batch_size: int, parts: int, tmp_path: Path) -> None:
    """Also where the parts, or the last batch, are of other sizes."""
    data, models = labelled(train), [plain(), plain()]
    losses: list[list[float]] = [[], []]
    for model, accumulate, seen in zip(models, (1, parts), losses, strict=True):
        trained(
            model,
            data,
            recipe(dtype="float64", batch_size=batch_size, accumulate=accumulate),
            tmp_path / str(accumulate),
            tell=lambda event, seen=seen: seen.append(event.loss) if isinstance(event, StepEvent) else None,
        )
    whole, added = (values(model) for model in models)
    for name in whole:
        torch.testing.assert_close(added[name], whole[name], rtol=SAME, atol=SAME)
    assert losses[1] == pytest.approx(losses[0], rel=SAME)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_whole_gradient_is_clipped(parts: int, tmp_path: Path) -> None:
    data, chosen = labelled(), recipe(dtype="float64", steps=1, momentum=0, clip=0.01, accumulate=parts)
    model, hand = plain(), plain().double()
    before = values(hand)
    trained(model, data, chosen, tmp_path / "run")
    inputs, targets = next(steps_of(data, chosen))
    F.cross_entropy(hand(inputs), targets).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in hand.parameters() if p.grad is not None))
    assert norm > chosen.clip
    for name, parameter in hand.named_parameters():
        # torch divides by the norm plus 1e-6.
        expected = before[name] - chosen.lr * parameter.grad * 0.01 / (norm + 1e-6)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=SAME, atol=SAME)


def test_events_and_metrics_say_the_same(tmp_path: Path) -> None:
    told: list[Any] = []
    run = RunFolder(tmp_path / "run")
    result = trained(geometric(), labelled(), recipe(steps=7, save_every=2), run.path, tell=told.append)
    kinds = "".join(type(event).__name__[:2] for event in told)
    # Evaluated before the first step, after the epoch of five, and at the end.
    assert kinds == "EvSa" + "StStSa" * 2 + "StEvSa" + "StSaStEvSa"
    steps = [event for event in told if isinstance(event, StepEvent)]
    assert [(event.step, event.steps, event.epoch) for event in steps] == [
        (i, 7, 1 + (i > 5)) for i in range(1, 8)
    ]
    assert steps[-1].eta_s == 0
    assert all(0 <= event.waiting <= 1 and event.samples_per_s > 0 for event in steps)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [event.loss for event in steps]
    evaluations = [event for event in told if isinstance(event, EvaluationEvent)]
    assert [event.epoch for event in evaluations] == [0, 1, 2]
    rows = list(csv.DictReader(run.table.read_text().splitlines()))
    for event, line, row in zip(
        evaluations, (line for line in lines if "loss" not in line), rows, strict=True
    ):
        assert (line["epoch"], line["step"]) == (event.epoch, event.result.step)
        assert (line["validation_loss"], line["accuracy"], line["best"]) == (
            event.result.loss,
            event.result.value,
            event.best,
        )
        assert row == {key: "" if value is None else str(value) for key, value in line.items()}
    assert evaluations[1].train_loss == pytest.approx(sum(event.loss for event in steps[:5]) / 5, rel=SAME)
    assert evaluations[2].train_loss == pytest.approx(sum(event.loss for event in steps[5:]) / 2, rel=SAME)
    assert [event.step for event in told if isinstance(event, SavedEvent)] == [0, 2, 4, 5, 6, 7]
    assert result.best in [event.result for event in evaluations]
