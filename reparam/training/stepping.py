"""One optimizer step: the gradient of the mean over a global batch, in parts, in mixed precision, clipped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reparam.layers import gathered_gradients
from reparam.training.distributed import World
from reparam.training.objective import Objective
from reparam.training.precision import Precision

#: loss scale of fp16 below which its gradients are not too large for the type but wrong
_SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class Step:
    """What one step gave.

    Attributes:
        loss: mean over the global batch, before the step.
        trouble: what was not finite, "" for a step that went well. The weights were not changed then.
        stop: some rank was asked to stop.
    """

    loss: float
    trouble: str
    stop: bool


class Stepper:
    """Takes optimizer steps.

    Args:
        model: whose parameters ``optimizer`` holds.
        network: what is run: ``model``, wrapped where there are several ranks.
        scaler: of fp16's loss, or a disabled one.
        samples: of a global batch.
        parts: in how many a rank's share is computed.
        clip: largest norm of the gradient; None for none.
        compiled: run it through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        objective: Objective,
        precision: Precision,
        world: World,
        *,
        samples: int,
        parts: int = 1,
        clip: float | None = None,
        compiled: bool = False,
    ) -> None:
        self._model, self._network = model, network
        self._run: Callable[[Tensor], Any] = torch.compile(network) if compiled else network
        self._optimizer, self._scaler = optimizer, scaler
        self._objective, self._precision, self._world = objective, precision, world
        self._samples, self._parts, self._clip = samples, parts, clip

    def take(self, inputs: Tensor, targets: Tensor, stop: bool = False) -> Step:
        """A step on this rank's share of a batch, which lies on the device.

        Args:
            stop: this rank was asked to stop: it is told to all.
        """
        self._optimizer.zero_grad()
        total = self.backward(inputs, targets)
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        told = self._world.sum_(torch.stack([total, total.new_tensor(float(stop))]))
        loss, stops, size = torch.cat([told, norm.detach().double().reshape(1)]).tolist()
        loss /= self._samples
        trouble = self._trouble(loss, size)
        if not trouble:
            if self._clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self._model.parameters(), self._clip, norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return Step(loss, trouble, stops > 0)

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the gradient, the loss scaled for fp16; the loss summed over this rank's samples, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self._precision.device)
        with self._composed_once():
            for part in range(self._parts):
                mine = slice(*(len(inputs) * end // self._parts for end in (part, part + 1)))
                with self._exchange(last=part == self._parts - 1):
                    with self._precision.autocast():
                        outputs = self._objective.outputs(self._run(inputs[mine]))
                    loss = self._objective.loss_sum(outputs, targets[mine])
                    # Averaged over ranks, as DistributedDataParallel does, this is the mean over the global batch.
                    self._scaler.scale(loss * (self._world.size / self._samples)).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        return total

    def _composed_once(self) -> contextlib.AbstractContextManager[None]:
        """Weights are composed once for all parts, but where ranks wait for gradients within each backward pass."""
        if self._parts == 1 or self._world.size > 1:
            return contextlib.nullcontext()
        return gathered_gradients(self._model)

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged between ranks once, with the last part."""
        if self._world.size == 1 or last:
            return contextlib.nullcontext()
        assert isinstance(self._network, DistributedDataParallel)
        return self._network.no_sync()

    def _trouble(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        # In fp16 a gradient may be too large for the type: the scaler leaves the step out and scales less.
        if not math.isfinite(norm) and not (
            self._scaler.is_enabled() and self._scaler.get_scale() > _SMALLEST_SCALE
        ):
            return f"the norm of the gradient is {norm}"
        return ""
