"""Loss and metric over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from reparam.training.distributed import World
from reparam.training.events import Evaluation
from reparam.training.objective import Objective


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    world: World,
    step: int = 0,
) -> Evaluation:
    """Evaluate a network on this rank's batches, and all ranks' together.

    Args:
        forward: the network in evaluation mode, on inputs that lie on ``world.device``.
        batches: inputs and targets, of the world's device.
        step: for the result.

    Returns:
        Means over all samples; NaN or Inf where outputs are.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for inputs, targets in batches:
        if not len(inputs):
            continue
        outputs = objective.outputs(forward(inputs))
        sums = [objective.loss_sum(outputs, targets).double(), objective.metric_sum(outputs, targets)]
        totals += torch.stack([*sums, totals.new_tensor(len(inputs))])
    loss, metric, samples = world.sum_(totals).tolist()
    return Evaluation(step, loss / samples, objective.metric, objective.metric_of(metric, int(samples)))
