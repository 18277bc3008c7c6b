"""The processes of one run: one without torchrun, as many as torchrun started with it.

    torchrun --nproc-per-node=2 -m reparam finetune ...

Every process runs the same program on its own share of each batch. What must agree goes over :class:`World`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reparam.errors import ReparamError, first_line

#: what torchrun sets besides WORLD_SIZE
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: groups that were left, kept until the program ends
_left: list[object] = []


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    All methods that communicate must be called by every rank, in the same order.

    Attributes:
        rank: from 0; rank 0 alone prints and writes.
        size: number of processes.
        device: this process's own.
        joined: it joined the process group itself, and so leaves it.
    """

    rank: int
    size: int
    device: torch.device
    joined: bool = False

    @classmethod
    def current(cls, device: str = "auto") -> World:
        """The world torchrun's environment describes, joined (gloo on CPU, NCCL on CUDA); without it, one process.

        Args:
            device: "cpu", "cuda", or "auto": CUDA where there is one. Each local rank takes its own GPU.

        Raises:
            ReparamError: no such device, more processes than GPUs, or the others cannot be reached.
        """
        if dist.is_available() and dist.is_initialized():  # by a program of the user's own
            rank = dist.get_rank()
            return cls(rank, dist.get_world_size(), _device(device, int(os.environ.get("LOCAL_RANK", rank))))
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(0, 1, _device(device, 0))
        missing = next((name for name in _ENVIRONMENT if name not in os.environ), None)
        if missing is not None:
            raise ReparamError(f"WORLD_SIZE is {size}, but {missing} is not set: start with torchrun")
        rank, place = int(os.environ["RANK"]), _device(device, int(os.environ["LOCAL_RANK"]))
        if place.type == "cuda":
            torch.cuda.set_device(place)
        try:
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            why = first_line(error)
            raise ReparamError(f"rank {rank} of {size} cannot reach the others: {why}") from error
        return cls(rank, size, place, joined=True)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; integers and float64 as exactly as their type holds them."""
        if self.size > 1:
            with self.together():
                dist.all_reduce(tensor)
        return tensor

    def any_(self, value: bool) -> bool:
        """Whether it holds on some rank: what one decides (to stop, to give up), all do."""
        return bool(self.sum_(torch.tensor(int(value), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any_(False)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over ranks; with one process, the model itself.

        A loss of size/(global batch)·Σ over the rank's own samples then gives the gradient of the mean over the global
        batch, also where ranks hold different numbers of samples.
        """
        if self.size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        with self.together():
            return cast(nn.Module, DistributedDataParallel(model, device_ids=ids))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a rank that is gone ends this one too, with one line: what happened to it is its own to say.

        Around a forward or backward pass; the methods of this class need none.

        Raises:
            ReparamError: another rank cannot be reached any more.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise ReparamError(
                    f"rank {self.rank}: another process of this run ended; its own message says why"
                ) from error
            raise

    def align(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0, before an evaluation: batch norms follow each rank's own samples.

        Those of mean normalization are the same on all ranks anyway.
        """
        if self.size > 1:
            with self.together():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def close(self) -> None:
        """Leave the group, after the last communication or a failure; a second time does nothing."""
        if self.joined and dist.is_initialized():
            # A DistributedDataParallel that outlives the group, in a traceback say, would be the last to let go of it:
            # with the interpreter's lock held, waiting for a thread that waits for that lock (torch 2.13, gloo).
            _left.append(dist.group.WORLD)
            dist.destroy_process_group()


def _device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ReparamError(
            "--device cuda: torch sees no GPU here: use --device cpu, or a torch built for CUDA"
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ReparamError(
            f"local rank {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()}: "
            "start as many processes as GPUs (torchrun --nproc-per-node), or use --device cpu"
        )
    return torch.device("cuda", local_rank)
