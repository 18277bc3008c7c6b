"""The training loop: stochastic gradient descent with momentum, angles at a rate of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.errors import CheckFailedError, DataError, ReparamError
from reparam.layers import GeometricMixin
from reparam.training.data import Dataset, Split

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch_size: images of one step, at most the training set.
        lr: learning rate of everything but angles.
        angle_lr: learning rate of theta, in radians. A step on theta_j moves the weight by r²P_j² times
            what the same rate would move it in plain weights (P_j = ∏_{i<j} cos t_i): a tenth of ``lr`` stays
            below a plain step for rows of norm up to 3.
        momentum: of SGD, for both.
        seed: of the order of the images and of the model's own noise (dropout).
    """

    steps: int = 50
    batch_size: int = 128
    lr: float = 0.01
    angle_lr: float = 0.001
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ReparamError(
                f"--steps {self.steps}, --batch-size {self.batch_size}: both must be at least 1"
            )
        for option, value in (
            ("--lr", self.lr),
            ("--angle-lr", self.angle_lr),
            ("--momentum", self.momentum),
        ):
            if not 0 <= value < math.inf:
                raise ReparamError(f"{option} {value}: must be a finite number, not below 0")


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracies in [0, 1] on the test split, and the training loss of every step."""

    accuracy_before: float
    accuracy_after: float
    losses: tuple[float, ...]


def finetune(
    model: nn.Module, data: Dataset, recipe: Recipe, on_step: Callable[[int, float], None] | None = None
) -> FinetuneResult:
    """Train ``model`` in place on the cross-entropy of ``data.train``.

    The same arguments give the same weights, bit for bit, on one machine with one thread count. Batch norms
    learn their running statistics as in any training. The model is left in evaluation mode.

    Args:
        model: (N, 1, H, W) -> (N, classes) logits.
        data: on the model's device.
        recipe: see :class:`Recipe`.
        on_step: called after every step with its number, from 1, and its loss.

    Raises:
        DataError: the model does not take the images, or has fewer outputs than the data has classes.
        CheckFailedError: the loss is not finite, before or while training.
    """
    before = _preflight(model, data)
    optimizer = torch.optim.SGD(_groups(model, recipe), momentum=recipe.momentum)
    losses = []
    # The caller's random numbers are not disturbed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model.train()
        for step, batch in zip(range(1, recipe.steps + 1), _batches(len(data.train), recipe), strict=False):
            loss = F.cross_entropy(model(data.train.images[batch]), data.train.labels[batch])
            value = float(loss.detach())
            if not math.isfinite(value):
                raise CheckFailedError(
                    f"the loss is {value} at step {step}: training diverged; lower --angle-lr (now "
                    f"{recipe.angle_lr:g}) or --lr (now {recipe.lr:g})"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(value)
            if on_step is not None:
                on_step(step, value)
    return FinetuneResult(before, accuracy(model, data.test), tuple(losses))


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of ``split`` whose largest logit is its label's; leaves the model in evaluation mode.

    Raises:
        CheckFailedError: a logit is NaN or Inf.
    """
    model.eval()
    right = 0
    for start in range(0, len(split), _EVALUATION_BATCH):
        part = slice(start, start + _EVALUATION_BATCH)
        logits: Tensor = model(split.images[part])
        if not bool(torch.isfinite(logits).all()):
            raise CheckFailedError("the model's outputs are not finite: lower --angle-lr or --lr")
        right += int((logits.argmax(1) == split.labels[part]).sum())
    return right / len(split)


def _preflight(model: nn.Module, data: Dataset) -> float:
    """The accuracy before training; what cannot work is found out before the first step."""
    shape = list(data.test.images.shape[1:])
    try:
        with torch.no_grad():
            logits = model.eval()(data.test.images[:2])
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"the model does not take images of {shape}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"the model gives {got} for two images of {shape}, not (2, classes) logits")
    if logits.shape[1] < data.classes:
        raise DataError(f"the model has {logits.shape[1]} outputs, the data {data.classes} classes")
    return accuracy(model, data.test)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    """Parameter groups by kind: angles, and everything else."""
    held = [module.theta for module in model.modules() if isinstance(module, GeometricMixin)]
    angle_ids = {id(theta) for theta in held}
    angles = [p for p in model.parameters() if id(p) in angle_ids and p.requires_grad]
    other = [p for p in model.parameters() if id(p) not in angle_ids and p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": angles, "lr": recipe.angle_lr},
        {"params": other, "lr": recipe.lr},
    ]
    return [group for group in groups if group["params"]]


def _batches(count: int, recipe: Recipe) -> Iterator[Tensor]:
    """Batches of indices without end: a new order every epoch, incomplete last batches dropped."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = min(recipe.batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
