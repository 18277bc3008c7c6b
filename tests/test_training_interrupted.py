"""A run that is asked to stop saves its state; one that is killed, even within a save, has an earlier one."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from support import ROOT, assert_same_bits, python
from training_cases import SIZES, geometric, labelled, recipe, trained, values, written

from reparam.training import RunFolder, State, StepEvent

pytestmark = pytest.mark.usefixtures("unsynced")


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
