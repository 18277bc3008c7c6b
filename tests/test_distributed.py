"""Two ranks are one process: the same weights, running means, losses and metrics at the same global batch."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training_cases import Held, geometric, labelled, plain, recipe, trained, values

from reparam import convert
from reparam.errors import DataError, ReparamError
from reparam.layers import layer_class
from reparam.training.distributed import World
from reparam.training.events import EvaluationEvent, Event, StepEvent

pytestmark = pytest.mark.slow  # processes that import torch

CLOSE = 1e-10


class Recurrent(nn.Module):
    """(N, 3, 6, 6) images as six steps of 18 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(18, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x.reshape(len(x), 6, 18))[0][:, -1])
        return out


def network(form: str | None = None, mean: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 5)).double()
    if form is not None:
        model = convert(model, to=form)
        for name in ("0", "2") if mean is not None else ():
            model.get_submodule(name).normalize_mean(mean)
    return model


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    model = Recurrent().double()
    model.rnn = layer_class("gmp", nn.RNN).from_plain(model.rnn).normalize_mean("mn")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "gmp+mn": lambda: network("gmp", "mn"),
    "gmp+mbn": lambda: network("gmp", "mbn"),
    "wn+mn": lambda: network("wn", "mn"),
    "wn+mbn": lambda: network("wn", "mbn"),
    "recurrent": recurrent,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}

#: of 8 samples, what each rank has
SHARES = {"equal": (4, 4), "unequal": (3, 5), "one has none": (0, 8)}
CASES = [
    *[(model, optimizer, "equal") for model in MODELS for optimizer in OPTIMIZERS],
    *[(model, "sgd", share) for model in ("gmp+mn", "wn+mbn") for share in ("unequal", "one has none")],
]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randint(5, (8,), generator=generator)


def steps(
    model: nn.Module,
    network: Callable[[Tensor], Tensor],
    optimizer: str,
    mine: slice = slice(None),
    size: int = 1,
) -> dict[str, Tensor]:
    """Three steps by hand, with the scaling of the loss that ``World.wrap`` asks for."""
    taken = OPTIMIZERS[optimizer](model.parameters())
    for step in range(3):
        x, y = batch(step)
        taken.zero_grad()
        loss = F.cross_entropy(network(x[mine]), y[mine], reduction="sum") * size / len(x)
        loss.backward()
        taken.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layer = layer_class("gmp", nn.Linear).from_plain(nn.Linear(108, 5)).normalize_mean("mn")
    return nn.Sequential(nn.Flatten(), layer).double()


def checkpointed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


#: how a run of the whole loop is made: its network, and its recipe
RUNS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "gmp+mn, sgd": (
        lambda: geometric(),
        {"clip": 0.5, "ema": 0.8, "schedule": "cosine", "warmup": 3, "weight_decay": 0.01, "lr": 0.3},
    ),
    "wn+mbn, adam": (lambda: centered(), {"optimizer": "adam", "lr": 0.01}),
    "batch norm": (lambda: normed(), {"lr": 0.3}),
    "plain, in parts": (lambda: plain(), {"accumulate": 2, "lr": 0.2, "schedule": "plateau", "patience": 1}),
}


def centered() -> nn.Module:
    model = convert(plain(), to="wn")
    model.get_submodule("0").normalize_mean("mbn")
    return model


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def run(name: str, folder: Path, world: World | None = None, **options: Any) -> dict[str, Any]:
    """A run of three epochs of five steps; the last of three validation batches is of one sample."""
    make, fields = RUNS[name]
    model, losses, metrics = make(), [], []

    def tell(event: Event) -> None:
        if isinstance(event, StepEvent):
            losses.append(event.loss)
        elif isinstance(event, EvaluationEvent):
            metrics.append([event.result.loss, event.result.value])

    chosen = recipe(dtype="float64", **fields)
    result = trained(model, labelled(), chosen, folder, world=world, tell=tell, **options)
    return {
        "weights": dict(values(model)),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "metrics": torch.tensor(metrics, dtype=torch.float64),
        "last": torch.tensor([result.last.loss, result.last.value], dtype=torch.float64),
        "interrupted": result.interrupted,
    }


# What the two ranks do. All of it in one start: importing torch takes longer than the rest.


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    warnings.filterwarnings(
        "ignore", r"The \.grad attribute", UserWarning
    )  # torch's compiler, of its own tensors
    early = perceptron()
    compiled = torch.compile(early, backend="aot_eager")
    compiled(batch(0)[0])  # before the ranks meet
    world = World.current("cpu")
    found: dict[str, Any] = {"world": _world(world)}
    for name, optimizer, share in CASES:
        first = SHARES[share][0]
        model, mine = MODELS[name](), slice(first) if rank == 0 else slice(first, None)
        found[f"{name} {optimizer} {share}"] = steps(model, world.wrap(model), optimizer, mine, 2)
    mine = slice(4) if rank == 0 else slice(4, None)
    model = network("gmp", "mn")
    found["checkpointed"] = steps(model, checkpointed(world.wrap(model)), "sgd", mine, 2)
    found["early"] = compiled(batch(0)[0][mine]).detach()
    found["compiled"] = steps(early, world.wrap(compiled), "sgd", mine, 2)
    found["alone"] = _alone(rank)
    for name in RUNS:
        found[name] = run(name, Path(folder, f"{name} {rank}"), world)
    asked = iter([False] * 7 + [True] * 20)
    found["stopped"] = run(
        "gmp+mn, sgd", Path(folder, f"stopped {rank}"), world, stop=lambda: rank == 1 and next(asked)
    )
    found["lost"] = _lost(world, Path(folder, f"lost {rank}"))
    torch.save(found, f"{folder}/{rank}.pt")
    world.close()
    assert not dist.is_initialized()


def _world(world: World) -> dict[str, Any]:
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(4, 2) + world.rank)
    world.align(norm)
    again = World.current("cpu")
    again.close()  # joined by someone else: stays
    world.barrier()
    return {
        "rank": world.rank,
        "main": world.is_main,
        "again": (again.rank, again.size),
        "integers": world.sum_(torch.tensor([2**40 + 1, world.rank])),
        "floats": world.sum_(torch.tensor([0.1, float(world.rank)], dtype=torch.float64)),
        "any": [world.any_(value) for value in (False, True, world.rank == 1)],
        "aligned": norm.running_mean,
    }


def _alone(rank: int) -> Tensor | None:
    """Evaluation on one rank while the other does something else."""
    model = network("gmp", "mn").eval()
    return model(batch(0)[0]).detach() if rank == 0 else None


def _lost(world: World, folder: Path) -> str:
    """Sample 3 cannot be read by the rank that gets it: what both say. The last thing they do together."""

    class Broken(Held):
        def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
            if 3 in indices:
                raise DataError("sample 3: cannot be read")
            return super().take(indices)

    data = labelled()
    data = replace(data, train=Broken(data.train.inputs, data.train.targets))
    try:
        trained(plain(), data, recipe(), folder, world=world)
    except ReparamError as error:
        if "ended" in str(error):  # and so does everything later
            with pytest.raises(ReparamError, match=str(error)):
                world.barrier()
        world.close()
        return str(error)
    return ""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder), free_port()), nprocs=2)
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
