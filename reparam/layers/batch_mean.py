"""The mean of a mini-batch, over all processes it is spread over."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def batch_mean(x: Tensor, channel: int) -> Tensor:
    """Mean over all axes but the channel's, and over all ranks, in float32 or above; differentiable.

    In a process group (DistributedDataParallel, torchrun) every rank must call it, in the same order; ranks may hold
    different numbers of samples. The result is the same on all of them, bit for bit. With gradients averaged over
    ranks, or summed, training is that of one process with the whole batch.

    Args:
        x: this rank's share.
        channel: axis of the channels.
    """
    axes = [axis for axis in range(x.dim()) if axis != channel % x.dim()]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not _spread():
        mean: Tensor = wide.mean(dim=axes) if axes else wide
        return mean
    total = wide.sum(dim=axes) if axes else wide
    count = total.new_full((1,), x.numel() // x.shape[channel])
    joined: Tensor = _sum_over_ranks(torch.cat([total, count]))
    return joined[:-1] / joined[-1]


def _spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on every rank's value, so its gradient is a sum over ranks too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum(grad)


def _sum(value: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(value))  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sum_over_ranks(value: Tensor) -> Tensor:
    """Compiled code breaks its graph here, where ranks wait for one another anyway."""
    return _sum(value)
