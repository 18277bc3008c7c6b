"""A run that was stopped or killed and resumed ends with the bits of one that was not."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, assert_same_bits, python
from torch import nn
from training_cases import (
    convolutional,
    geometric,
    labelled,
    measured,
    pictures,
    plain,
    recipe,
    trained,
    values,
)

from reparam.errors import CheckpointError, DataError, ReparamError
from reparam.training import Recipe, RunFolder, State, StepEvent
from reparam.training.data.types import Data


@dataclass(frozen=True)
class Case:
    """A run with everything that has a state in some case."""

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    recipe: Recipe


SIZES = (13, 5)  # three steps an epoch, two batches an evaluation
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


@pytest.fixture(autouse=True)
def _memory_is_disk_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing of what it wrote, synced or not; only the machine's death would."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Stopper:
    """Asks to stop from the n-th time it is asked on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def written(folder: Path) -> dict[str, object]:
    """What a run leaves, but for the pace it went at and the state's packing."""
    run = RunFolder(folder)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        for measured_ in ("samples_per_s", "waiting"):
            line.pop(measured_, None)
    files = {file.name: file.read_bytes() for file in (run.best, run.last, *run.earlier(), run.table)}
    state = {
        name: value for name, value in vars(State.load(run.state)).items() if name not in ("file", "metrics")
    }
    return {"lines": lines, **files, "state": flat(state)}


def flat(value: object) -> object:
    """Tensors as comparable values."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: flat(one) for key, one in value.items()}
    return [flat(one) for one in value] if isinstance(value, (list, tuple)) else value


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


def test_an_evaluation_is_not_waited_for(tmp_path: Path) -> None:
    """Asked to stop after the last step of an epoch: the evaluation is left to the resumed run."""
    told: list[object] = []
    model = geometric()
    result = trained(
        model,
        labelled(*SIZES),
        recipe(),
        tmp_path / "run",
        tell=told.append,
        stop=lambda: isinstance(told[-1], StepEvent) and told[-1].step == 3,
    )
    assert (result.interrupted, result.step, result.last.step) == (True, 3, 0)
    assert not model.training


def test_sigterm_saves(tmp_path: Path) -> None:
    """As the command does it: the handler sets what ``stop`` reads."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    whole, resumed = geometric(dropout=0.2), geometric(dropout=0.2)
    try:
        result = trained(
            geometric(dropout=0.2),
            labelled(),
            recipe(),
            tmp_path / "run",
            stop=lambda: bool(asked),
            tell=lambda e: (
                os.kill(os.getpid(), signal.SIGTERM) if isinstance(e, StepEvent) and e.step == 7 else None
            ),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.interrupted, result.step) == (True, 8)
    assert State.load(RunFolder(tmp_path / "run").state).progress["step"] == 8
    trained(resumed, labelled(), recipe(), tmp_path / "run", resumed=True)
    trained(whole, labelled(), recipe(), tmp_path / "whole")
    assert_same_bits(values(resumed), values(whole))


#: Runs in processes that it forks, which costs no import: argv is the folder, then steps or "instants".
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
os.fsync = lambda handle: None  # a killed process loses nothing of what it wrote
from reparam.training import RunFolder, State, StepEvent, train
from training_cases import geometric, labelled, recipe

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(folder, tell=None, watch=None):
    "The run in a process of its own: whether it was killed."
    child = os.fork()
    if not child:
        if watch is not None:
            sys.addaudithook(watch)
        where = RunFolder(folder)
        where.path.mkdir(exist_ok=True)
        resume = State.load(where.state) if where.state.exists() else None
        train(geometric(dropout=0.3), labelled(13, 5), recipe(epochs=2, save_every=2), where, resume=resume, tell=tell)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status)

def at_step(step):
    return lambda event: die() if isinstance(event, StepEvent) and event.step == step else None

def at_instant(folder, number):
    "Before the number-th thing that is done to a file in the folder."
    seen = [0]
    def watch(event, arguments):
        changes = event in ("os.rename", "os.remove", "os.link", "os.truncate") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(folder) in str(arguments[0]):
            seen[0] += 1
            if seen[0] == number:
                die()
    return watch

folder = Path(sys.argv[1])
run(folder / "whole")
for name in sys.argv[2:]:
    what, _, number = name.partition("-")
    where = folder / name
    killed = run(where, **({"tell": at_step(int(number))} if what == "step" else {"watch": at_instant(where, int(number))}))
    assert killed, name
    run(where)
"""


#: three steps, and those of the run's 56 instants at which a file of a save is half done: before and after its rename
INSTANTS = (5, 8, 11, 23, 24, 25, 26, 28, 31, 46, 49, 52, 55)
MOMENTS = [f"step-{step}" for step in random.Random(5).sample(range(1, 7), 3)]
MOMENTS += [f"instant-{number}" for number in INSTANTS]


@pytest.mark.slow  # a process that imports torch
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_steps_and_within_saves(tmp_path: Path) -> None:
    """The folder of a run that was killed and resumed is, byte for byte, that of one that was not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    ran = python(KILLED, tmp_path, *MOMENTS, env=environment)
    assert ran.returncode == 0, ran.stderr
    expected = written(tmp_path / "whole")
    for moment in MOMENTS:
        assert written(tmp_path / moment) == expected, moment


# --- what is no resuming


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"lr": 0.2}, "state.pt: the run has --lr 0.1, not 0.2: it can only go on as it began"),
        ({"batch_size": 5}, "the run has --batch-size 4, not 5"),
        ({"seed": 1}, "the run has --seed 0, not 1"),
        ({"optimizer": "adam"}, "the run has --optimizer sgd, not adam"),
        ({"ema": 0.9}, "the run has --ema None, not 0.9"),
    ],
)
def test_another_recipe_is_another_run(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    trained(geometric(), labelled(), recipe(), tmp_path / "run", stop=Stopper(3))
    with pytest.raises(ReparamError) as caught:
        trained(geometric(), labelled(), recipe(**fields), tmp_path / "run", resumed=True)
    assert told in str(caught.value)


def test_what_may_change() -> None:
    from reparam.training import state

    free = {
        "epochs",
        "steps",
        "early_stop",
        "compile",
        "device",
        "workers",
        "save_every",
        "keep",
    }
    assert free == state._MAY_CHANGE
    assert free < Recipe.model_fields.keys()


def test_other_data_is_another_run(tmp_path: Path) -> None:
    trained(plain(), labelled(), recipe(), tmp_path / "run", stop=Stopper(3))
    for data, told in (
        (labelled(train=23), "the run's data has training samples 22, this has 23"),
        (labelled(validation=8), "validation samples 9, this has 8"),
    ):
        with pytest.raises(DataError, match=told):
            trained(plain(), data, recipe(), tmp_path / "run", resumed=True)


def test_another_network_is_another_run(tmp_path: Path) -> None:
    trained(plain(), labelled(), recipe(), tmp_path / "run", stop=Stopper(3))
    before = RunFolder(tmp_path / "run").state.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.pt: is of another network: `0.r` differs"):
        trained(geometric(), labelled(), recipe(), tmp_path / "run", resumed=True)
    assert RunFolder(tmp_path / "run").state.read_bytes() == before


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match=r"state\.pt: no such file: nothing to resume in"):
        State.load(file)
    trained(plain(), labelled(), recipe(), tmp_path / "run", stop=Stopper(3))
    whole = (tmp_path / "run" / "state.pt").read_bytes()
    for damaged in (b"", b"not a state", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"state\.pt: cannot be read .*: start again with --force"
        ) as caught:
            State.load(file)
        assert "\n" not in str(caught.value)
    for other in ({"model": {}}, [1, 2], {"format": 2}):
        torch.save(other, file)
        with pytest.raises(CheckpointError, match="not the state of a run of this release"):
            State.load(file)


def test_a_state_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "done"),)

    torch.save({"format": 1, "model": Evil()}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        State.load(tmp_path / "state.pt")
    assert not (tmp_path / "done").exists()


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


def test_rates_that_depend_on_the_end_keep_it(tmp_path: Path) -> None:
    chosen = recipe(epochs=2, schedule="cosine")
    trained(plain(), labelled(), chosen, tmp_path / "run", stop=Stopper(2))
    with pytest.raises(ReparamError, match="--epochs 2, not 4"):
        trained(plain(), labelled(), recipe(epochs=4, schedule="cosine"), tmp_path / "run", resumed=True)
