"""Two ranks are one process: the same weights, running means, losses and metrics at the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, MODELS, RUNS, batch, network, normed, perceptron, run, steps
from torch.nn import functional as F
from training_cases import labelled
from two_ranks import spawn_both

from reparam.errors import ReparamError
from reparam.training.distributed import World

pytestmark = pytest.mark.slow  # processes that import torch
CLOSE = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn_both(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_the_world(ranks: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found["world"] for found in ranks):
        assert (one["rank"], one["main"], one["again"]) == (rank, rank == 0, (rank, 2))
        assert one["integers"].tolist() == [2**41 + 2, 1]
        assert one["floats"].tolist() == [0.2, 1.0]
        assert one["any"] == [False, True, True]
    assert torch.equal(ranks[0]["world"]["aligned"], ranks[1]["world"]["aligned"])


@pytest.mark.parametrize(("name", "optimizer", "share"), CASES)
def test_two_ranks_train_as_one_process(
    ranks: list[dict[str, Any]], name: str, optimizer: str, share: str
) -> None:
    model = MODELS[name]()
    expected = steps(model, model, optimizer)
    both = [found[f"{name} {optimizer} {share}"] for found in ranks]
    start = MODELS[name]().state_dict()
    for key, value in expected.items():
        assert torch.equal(both[0][key], both[1][key]), key
        torch.testing.assert_close(both[0][key], value, rtol=CLOSE, atol=CLOSE)
        assert not torch.equal(value, start[key])


def test_with_activation_checkpointing(ranks: list[dict[str, Any]]) -> None:
    model = network("gmp", "mn")
    for key, value in steps(model, model, "sgd").items():
        both = [found["checkpointed"][key] for found in ranks]
        assert torch.equal(both[0], both[1])
        if "running" not in key:  # recomputed, it follows the batch twice, as batch norm's does
            torch.testing.assert_close(both[0], value, rtol=CLOSE, atol=CLOSE)


def test_compiled_before_the_ranks_met(ranks: list[dict[str, Any]]) -> None:
    model = perceptron()
    model(batch(0)[0])
    outputs = torch.cat([found["early"] for found in ranks])
    torch.testing.assert_close(outputs, model(batch(0)[0]).detach(), rtol=CLOSE, atol=CLOSE)
    for key, value in steps(model, model, "sgd").items():
        both = [found["compiled"][key] for found in ranks]
        assert torch.equal(both[0], both[1])
        torch.testing.assert_close(both[0], value, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "batch norm"])
def test_a_run_on_two_ranks_is_a_run_on_one(ranks: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    alone, (main, other) = run(name, tmp_path / "run"), (found[name] for found in ranks)
    assert len(alone["losses"]) == 15
    for key, value in alone["weights"].items():
        assert torch.equal(main["weights"][key], other["weights"][key]), key
        torch.testing.assert_close(main["weights"][key], value, rtol=CLOSE, atol=CLOSE)
    for key in ("losses", "metrics", "last"):
        torch.testing.assert_close(main[key], alone[key], rtol=CLOSE, atol=CLOSE)
    assert torch.equal(main["last"], other["last"])


def test_batch_norms_are_evaluated_as_they_are_saved(ranks: list[dict[str, Any]]) -> None:
    """Each rank follows its own samples, so this is no run of one process; but all evaluate rank 0's statistics."""
    model, data = normed().double().eval(), labelled()
    model.load_state_dict(ranks[0]["batch norm"]["weights"])
    outputs = model(data.validation.inputs.double())
    loss = F.cross_entropy(outputs, data.validation.targets).detach()
    for found in ranks:
        torch.testing.assert_close(found["batch norm"]["last"][0], loss, rtol=CLOSE, atol=0)


def test_rank_0_alone_speaks_and_writes(ranks: list[dict[str, Any]], folder: Path) -> None:
    for name in RUNS:
        assert not len(ranks[1][name]["losses"])
        assert not len(ranks[1][name]["metrics"])
        assert {file.name for file in Path(folder, f"{name} 0").iterdir()} >= {"best.safetensors", "state.pt"}
        assert not any(Path(folder, f"{name} 1").iterdir())


def test_stopped_on_two_ranks_and_resumed_on_one(
    ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    """Rank 1 alone was asked to stop: in its eighth step, within the second epoch."""
    first = ranks[0]["stopped"]
    assert first["interrupted"]
    assert ranks[1]["stopped"]["interrupted"]
    assert len(first["losses"]) == 8
    alone = run("gmp+mn, sgd", tmp_path / "run")
    rest = run("gmp+mn, sgd", folder / "stopped 0", resumed=True)
    both = torch.cat([first["losses"], rest["losses"]])
    torch.testing.assert_close(both, alone["losses"], rtol=CLOSE, atol=CLOSE)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(rest["weights"][key], value, rtol=CLOSE, atol=CLOSE)


def test_a_rank_that_fails_ends_the_others(ranks: list[dict[str, Any]]) -> None:
    said = sorted(found["lost"] for found in ranks)
    gone = next(rank for rank in (0, 1) if "ended" in ranks[rank]["lost"])
    assert said == [
        f"rank {gone}: another process of this run ended; its own message says why",
        "sample 3: cannot be read",
    ]


def test_evaluation_does_not_communicate(ranks: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(
        ranks[0]["alone"], network("gmp", "mn").eval()(batch(0)[0]).detach(), rtol=CLOSE, atol=0
    )


def test_one_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = World.current("cpu")
    model, tensor = network(), torch.tensor([3.0])
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    assert world.wrap(model) is model
    assert world.sum_(tensor) is tensor
    assert (world.any_(True), world.any_(False)) == (True, False)
    world.barrier()
    world.align(model)
    world.close()
    assert not dist.is_initialized()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ReparamError, match=r"^--device cuda: torch sees no GPU here"):
        World.current("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ReparamError, match=r"^WORLD_SIZE is 2, but RANK is not set: start with torchrun$"):
        World.current("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ReparamError, match=r"^local rank 1 has no GPU of its own: torch sees 1: "):
        World.current()
