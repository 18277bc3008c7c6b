"""A run that was stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_same_bits
from torch import nn
from training_cases import (
    SIZES,
    Stopper,
    convolutional,
    geometric,
    labelled,
    measured,
    pictures,
    plain,
    recipe,
    trained,
    values,
    written,
)

from reparam.training import Recipe, RunFolder, State
from reparam.training.data.types import Data

pytestmark = pytest.mark.usefixtures("unsynced")


@dataclass(frozen=True)
class Case:
    """A run with everything that has a state in some case."""

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    recipe: Recipe


CASES = {
    "momentum, dropout, running means": Case(
        lambda: geometric(dropout=0.3),
        lambda: labelled(*SIZES),
        recipe(epochs=2, save_every=2, clip=1.0, keep=2),
    ),
    "adam, average, cosine": Case(
        geometric,
        lambda: labelled(*SIZES),
        recipe(epochs=2, optimizer="adam", ema=0.9, schedule="cosine", warmup=3, lr=0.02),
    ),
    "plateau, early stop": Case(
        lambda: plain(2, dropout=0.5),
        lambda: measured(*SIZES),
        recipe(epochs=9, schedule="plateau", patience=1, factor=0.5, early_stop=2, lr=0.2, momentum=0.5),
    ),
    "augmentation, batch norm, parts, the run ends within an epoch": Case(
        convolutional,
        lambda: pictures(*SIZES),
        recipe(flip=True, crop=1, accumulate=2, steps=5, nesterov=True, lr=0.01),
    ),
    "adamw, decay, bf16": Case(
        geometric,
        lambda: labelled(*SIZES),
        recipe(epochs=2, optimizer="adamw", weight_decay=0.1, amp="bf16", lr=0.01),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_stopped_anywhere_and_resumed_the_weights_are_the_same(name: str, tmp_path: Path) -> None:
    """In every step and in every evaluation, and twice on the way."""
    case = CASES[name]
    whole = case.model()
    trained(whole, case.data(), case.recipe, tmp_path / "whole")
    expected = written(tmp_path / "whole")
    stopped_at = set()
    for after in itertools.count():
        folder, first, second = tmp_path / str(after), case.model(), case.model()
        result = trained(first, case.data(), case.recipe, folder, stop=Stopper(after))
        if not result.interrupted:
            break
        stopped_at.add(result.step)
        if after % 3 == 0:
            trained(case.model(), case.data(), case.recipe, folder, resumed=True, stop=Stopper(2))
        trained(second, case.data(), case.recipe, folder, resumed=True)
        assert_same_bits(values(second), values(whole))
        found = written(folder)
        # A run saves when it is stopped, and keeps that too.
        kept = {key for key in {*found, *expected} if key.startswith("checkpoint-")}
        assert {k: v for k, v in found.items() if k not in kept} == {
            k: v for k, v in expected.items() if k not in kept
        }
        assert sum(key in found for key in kept) == case.recipe.keep
        shutil.rmtree(folder)
    total = State.load(RunFolder(tmp_path / "whole").state).progress["step"]
    assert stopped_at == set(range(1, total + 1))


def test_it_is_the_state_that_is_resumed_from_not_the_given_model(tmp_path: Path) -> None:
    whole, other = geometric(), geometric()
    trained(whole, labelled(), recipe(), tmp_path / "whole")
    trained(geometric(), labelled(), recipe(), tmp_path / "run", stop=Stopper(4))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    trained(other, labelled(), recipe(), tmp_path / "run", resumed=True)
    assert_same_bits(values(other), values(whole))


def test_more_epochs_go_on_as_if_they_had_been_asked_for(tmp_path: Path) -> None:
    whole, grown = geometric(dropout=0.2), geometric(dropout=0.2)
    trained(whole, labelled(), recipe(epochs=4), tmp_path / "whole")
    trained(grown, labelled(), recipe(epochs=2), tmp_path / "grown")
    trained(grown, labelled(), recipe(epochs=4, keep=3, save_every=100), tmp_path / "grown", resumed=True)
    assert_same_bits(values(grown), values(whole))


def test_a_run_that_ended_within_an_epoch_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """It was evaluated there, which schedules, that count epochs, must not notice."""

    def one(steps: int, folder: str, resumed: bool = False) -> nn.Module:
        model = plain(2, dropout=0.5)
        chosen = recipe(steps=steps, schedule="plateau", patience=1, factor=0.5, lr=0.2, momentum=0.5)
        trained(model, measured(*SIZES), chosen, tmp_path / folder, resumed=resumed)
        return model

    one(7, "grown")
    assert_same_bits(values(one(12, "grown", resumed=True)), values(one(12, "whole")))


class Moody(nn.Module):
    """What torch's seed and a state_dict do not cover: Python's and numpy's random numbers, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
            x = x * (1 + random.random() + np.random.rand()) / self.seen  # noqa: NPY002
        return self.last(self.first(x).tanh())


def test_a_networks_own_noise_and_buffers_are_resumed(tmp_path: Path) -> None:
    chosen = recipe(epochs=2)
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    whole, parts, again = Moody(), Moody(), Moody()
    trained(whole, labelled(*SIZES), chosen, tmp_path / "whole")
    trained(parts, labelled(*SIZES), chosen, tmp_path / "parts", stop=Stopper(4))
    trained(again, labelled(*SIZES), chosen, tmp_path / "parts", resumed=True)
    assert_same_bits(values(whole), values(again))
    assert float(whole.seen) == float(again.seen) > 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002
