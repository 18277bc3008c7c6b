"""What the two ranks of the distributed tests do. All of it in one start: importing torch takes longer than the rest."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import (
    CASES,
    MODELS,
    RUNS,
    SHARES,
    batch,
    checkpointed,
    network,
    perceptron,
    run,
    steps,
)
from torch import Tensor, nn
from training_cases import Held, labelled, plain, recipe, trained

from reparam.errors import DataError, ReparamError
from reparam.training.distributed import World


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    # torch's compiler, of its own tensors
    warnings.filterwarnings("ignore", r"The \.grad attribute", UserWarning)
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


def spawn_both(folder: Path) -> None:
    """Both ranks, until they have ended: what each found is in 0.pt and 1.pt."""
    mp.spawn(_rank, (str(folder), free_port()), nprocs=2)
