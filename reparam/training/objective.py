"""What is learned and how it is judged, as sums over samples: they add up exactly over batches, parts and ranks.

cross_entropy   −log softmax(outputs)[label]            mse, mae, huber   mean over the K values of a sample
accuracy        the label has the largest output        top5              it is among the five largest
rmse            √(mean of squared errors)               mae               mean of absolute errors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.errors import DataError, ReparamError
from reparam.training.recipe import TASK_OF_LOSS, TASK_OF_METRIC, Recipe, fitting

if TYPE_CHECKING:
    from reparam.training.data.types import Data
    from reparam.training.schedule import Better

_OF_VALUES: Mapping[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}
_DEFAULTS = {"classify": ("cross_entropy", "accuracy"), "regress": ("mse", "rmse")}


@dataclass(frozen=True)
class Objective:
    """Loss and metric of one task.

    Attributes:
        task: "classify" or "regress".
        loss, metric: by name, as a recipe has them.
        targets: number of classes, or values K of one sample.
        label_smoothing: share of a label spread over all classes.
    """

    task: str
    loss: str
    metric: str
    targets: int
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, data: Data) -> Objective:
        """The recipe's, the data's task where it names none.

        Raises:
            ReparamError: loss, metric or label smoothing do not fit the task, or the task does not fit the data.
        """
        if recipe.task is not None and recipe.task != data.task:
            raise DataError(f"--task {recipe.task}: the data is of the task {data.task}")
        loss, metric = _DEFAULTS[data.task]
        loss, metric = recipe.loss or loss, recipe.metric or metric
        for option, name, table in (("--loss", loss, TASK_OF_LOSS), ("--metric", metric, TASK_OF_METRIC)):
            if table[name] != data.task:
                raise ReparamError(
                    f"{option} {name} does not fit task {data.task}: {fitting(table, data.task)}"
                )
        if recipe.label_smoothing and data.task != "classify":
            raise ReparamError(f"--label-smoothing does not fit task {data.task}: leave it out")
        if metric == "top5" and data.targets <= 5:
            raise ReparamError(f"--metric top5 says nothing of {data.targets} classes: use accuracy")
        return cls(data.task, loss, metric, data.targets, recipe.label_smoothing)

    @property
    def better(self) -> Better:
        """Which values of the metric are."""
        return "higher" if self.task == "classify" else "lower"

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over samples, in float32 or above.

        Args:
            outputs: (N, C) logits, C at least the number of classes; or (N, K) values.
            targets: (N,) labels; or (N, K) values.
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.task == "classify":
            return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)
        return _OF_VALUES[self.loss](outputs, targets.to(outputs.dtype), reduction="sum") / self.targets

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What ``metric_of`` needs, summed over samples, in float64."""
        if self.metric == "accuracy":
            right = outputs.argmax(1) == targets
        elif self.metric == "top5":
            right = (outputs.topk(5, dim=1).indices == targets[:, None]).any(1)
        else:
            error = outputs.double() - targets.double()
            return (error.square() if self.metric == "rmse" else error.abs()).sum() / self.targets
        return right.double().sum()

    def metric_of(self, total: float, samples: int) -> float:
        """The metric over ``samples`` whose sums add up to ``total``."""
        mean = total / samples
        return math.sqrt(mean) if self.metric == "rmse" else mean

    def outputs(self, result: Any) -> Tensor:
        """The outputs (N, C) in what a network returned: a tensor, or the logits of a structure around them.

        Raises:
            DataError: there are none of that shape.
        """
        if not isinstance(result, Tensor):
            found = result.get("logits") if isinstance(result, dict) else getattr(result, "logits", None)
            if found is None and isinstance(result, (tuple, list)) and result:
                found = result[0]
            result = found if isinstance(found, Tensor) else result
        if isinstance(result, Tensor) and result.dim() == 1 and self.task == "regress":
            result = result[:, None]
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        if not isinstance(result, Tensor) or result.dim() != 2:
            kind = "logits (N, classes)" if self.task == "classify" else f"values (N, {self.targets})"
            raise DataError(f"the network gives {got}, not {kind}")
        if self.task == "classify" and result.shape[1] < self.targets:
            raise DataError(
                f"the network has {result.shape[1]} output(s), the data {self.targets} classes: give the network as many "
                "outputs, or --task regress where the targets are numbers to learn"
            )
        if self.task == "regress" and result.shape[1] != self.targets:
            raise DataError(
                f"the network has {result.shape[1]} output(s), the data {self.targets} value(s) to learn"
            )
        return result
