"""What is no resuming: another recipe, other data, another network, a state that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Stopper, geometric, labelled, plain, recipe, trained

from reparam.errors import CheckpointError, DataError, ReparamError
from reparam.training import Recipe, RunFolder, State

pytestmark = pytest.mark.usefixtures("unsynced")


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


def test_rates_that_depend_on_the_end_keep_it(tmp_path: Path) -> None:
    chosen = recipe(epochs=2, schedule="cosine")
    trained(plain(), labelled(), chosen, tmp_path / "run", stop=Stopper(2))
    with pytest.raises(ReparamError, match="--epochs 2, not 4"):
        trained(plain(), labelled(), recipe(epochs=4, schedule="cosine"), tmp_path / "run", resumed=True)


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
