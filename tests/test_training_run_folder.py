"""The run folder: what it refuses, what it keeps, and that its checkpoints are the tool's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, assert_same_bits, done, header_of, snapshot, tensors_of
from torch import Tensor, nn
from training_cases import geometric, labelled, plain, recipe, trained, values

from reparam.checkpoint import load_state_dict
from reparam.errors import CheckpointError, OutputError
from reparam.graph import apply_records, fold
from reparam.training import RunFolder, SavedEvent, load_recipe

pytestmark = pytest.mark.usefixtures("unsynced")


def test_an_earlier_run_is_only_replaced_by_force(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    run.check()
    assert not run.path.parent.exists()
    trained(plain(), labelled(), recipe(epochs=2, keep=3), run.path)
    run.write_config(recipe())
    (run.path / "notes.txt").write_text("mine")
    before = snapshot(run.path)
    with pytest.raises(
        OutputError, match=r"run: holds a run already: --resume continues it, --force replaces it"
    ):
        run.create()
    assert snapshot(run.path) == before
    run.create(force=True)
    assert snapshot(run.path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["state.pt", "config.yaml", "best.safetensors", "checkpoint-3.safetensors"])
def test_one_file_of_a_run_is_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(OutputError, match="holds a run already"):
        RunFolder(tmp_path).check()


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: exists and is not a folder"):
        RunFolder(tmp_path / "file").create()
    with pytest.raises(OutputError, match="run: cannot be written"):
        RunFolder(tmp_path / "file" / "run").create()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        RunFolder(tmp_path / "run").create()
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (1, [4]), (2, [3, 4]), (9, [0, 2, 3, 4])])
def test_retention(keep: int, kept: list[int], tmp_path: Path) -> None:
    """Saved at 0, 2, 3 (the epoch's end) and 4 steps, and at 6, which is the last."""
    run, told, model = RunFolder(tmp_path / "run"), {}, geometric()

    def keep_weights(event: object) -> None:
        if isinstance(event, SavedEvent):
            told[event.step] = values(model)

    trained(model, labelled(13, 5), recipe(epochs=2, save_every=2, keep=keep), run.path, tell=keep_weights)
    assert sorted(told) == [0, 2, 3, 4, 6]
    assert [file.name for file in run.earlier()] == [f"checkpoint-{step}.safetensors" for step in kept]
    for step, file in zip(kept, run.earlier(), strict=True):
        assert_same_bits(tensors_of(file), told[step])
    assert_same_bits(tensors_of(run.last), told[6])


def test_a_resumed_run_may_keep_fewer(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    trained(geometric(), labelled(), recipe(epochs=3, keep=3), run.path)
    assert len(run.earlier()) == 3
    trained(geometric(), labelled(), recipe(epochs=4, keep=0), run.path, resumed=True)
    assert run.earlier() == []


def test_retention_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run, first = RunFolder(tmp_path / "run"), geometric()
    trained(geometric(), labelled(), recipe(epochs=2), run.path)
    assert [file.name for file in run.earlier()] == ["checkpoint-5.safetensors"]
    trained(first, labelled(), recipe(epochs=1), tmp_path / "first")
    assert_same_bits(tensors_of(run.earlier()[0]), values(first))


def test_checkpoints_are_in_the_tools_own_format(tmp_path: Path) -> None:
    """``inspect`` and ``convert`` read them; folded, they load strict into the user's own class."""
    run, model = RunFolder(tmp_path / "run"), geometric()
    trained(model, labelled(), recipe(), run.path)
    tensors, records = load_state_dict(run.last)
    assert records.keys() == {"0.weight"}
    rebuilt = apply_records(plain(), records)
    rebuilt.load_state_dict(tensors, strict=True)
    inputs = labelled().validation.take(range(9))[0]
    rebuilt.eval()
    assert torch.equal(rebuilt(inputs), model(inputs))
    own = plain()
    own.load_state_dict(fold(model).state_dict(), strict=True)
    torch.testing.assert_close(own.eval()(inputs), model(inputs), rtol=1e-5, atol=1e-6)
    done("inspect", run.best, "--json")
    arch = f"{ROOT / 'tests' / 'training_cases.py'}:plain"
    done("convert", run.last, "--to", "sp", "--arch", arch, "-o", tmp_path / "plain.safetensors")
    assert_same_bits(tensors_of(tmp_path / "plain.safetensors"), own.state_dict())


def test_files_hold_what_the_caller_says_of_the_model(tmp_path: Path) -> None:
    def narrow(model: nn.Module) -> Mapping[str, Tensor]:
        return {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}

    run = RunFolder(tmp_path / "run")
    trained(plain(), labelled(), recipe(epochs=1), run.path, state_of=narrow)
    for file in (run.best, run.last, *run.earlier()):
        assert {tensor.dtype for tensor in tensors_of(file).values()} == {torch.bfloat16}
        assert header_of(file)["__metadata__"]["format"] == "pt"


def test_best_is_the_best_evaluation(tmp_path: Path) -> None:
    run, model, best = RunFolder(tmp_path / "run"), geometric(), {}

    def watch(event: Any) -> None:
        if getattr(event, "best", False):
            best.clear()
            best.update(values(model))

    # Too large a step: it gets worse again.
    result = trained(model, labelled(), recipe(epochs=6, lr=0.5), run.path, tell=watch)
    assert 0 < result.best.step < result.last.step
    assert_same_bits(tensors_of(run.best), best)
    assert not torch.equal(tensors_of(run.best)["0.theta"], tensors_of(run.last)["0.theta"])


def test_the_config_is_a_recipe_and_says_what_was_trained(tmp_path: Path) -> None:
    run, chosen = RunFolder(tmp_path / "run"), recipe(lr=1e-5, train="r", lrs="r=1e-4")
    run.create()
    network = {"arch": "file.py:fn", "source": "model.safetensors", "classes": ["Über", "b: c"]}
    run.write_config(chosen, network)
    assert load_recipe(run.config) == chosen
    assert run.network() == network
    run.write_config(chosen)
    assert run.network() == {}


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config\.yaml: cannot be read: is this the folder of a run\? \(No such"
    ):
        run.network()
    for text in ("- 1", "network: 3", "a: [", "3"):
        run.config.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read") as caught:
            run.network()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "state.pt", "last.safetensors"])
def test_a_full_disk_is_told_and_what_was_saved_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam.training import metrics, state

    run = RunFolder(tmp_path / "run")
    armed: list[bool] = []

    def full(*arguments: object, **options: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def arm(event: object) -> None:
        if isinstance(event, SavedEvent) and event.step == 5 and not armed:
            armed.append(True)
            if name == "state.pt":
                monkeypatch.setattr(state.torch, "save", full)
            elif name == "last.safetensors":
                monkeypatch.setattr("reparam.checkpoint.writing.SafetensorsWriter.write", full)
            else:
                monkeypatch.setattr(metrics.Path, "open", full)

    with pytest.raises(OutputError, match=rf"{name}: .*(disk is full|No space left)"):
        trained(geometric(), labelled(), recipe(), run.path, tell=arm)
    monkeypatch.undo()
    whole = geometric()
    trained(whole, labelled(), recipe(), tmp_path / "whole")
    again = geometric()
    trained(again, labelled(), recipe(), run.path, resumed=True)
    assert_same_bits(values(again), values(whole))
    assert not list(run.path.glob("*.partial"))
