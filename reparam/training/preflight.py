"""What can be known before the first step: that network, data and recipe fit, and what the run will be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reparam.errors import DataError, ReparamError, first_line
from reparam.graph import records_of
from reparam.training.data.augment import Augment
from reparam.training.data.loader import Batches
from reparam.training.distributed import World
from reparam.training.groups import freeze_except, make_groups, parameter_kinds
from reparam.training.memory import Memory, estimate, ran_out
from reparam.training.objective import Objective
from reparam.training.precision import Precision
from reparam.training.recipe import KINDS, Recipe
from reparam.training.remarks import remarks

if TYPE_CHECKING:
    from reparam.training.data.types import Data


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one kind that are trained alike, or the frozen ones of it.

    Attributes:
        tensors, numbers: how many.
        lr, weight_decay: None where frozen.
    """

    kind: str
    tensors: int
    numbers: int
    lr: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class Preflight:
    """A run that could begin.

    Attributes:
        objective: what is learned.
        inputs: shape of one input.
        outputs: width of the network's output.
        groups: its parameters.
        steps_per_epoch, steps: of an epoch, of the whole run.
        batch, part: samples of an optimizer step on all devices; of one forward pass on one.
        device: of this process, and how many of them there are.
        memory: of one device.
        notes: what the user should know.
    """

    objective: Objective
    inputs: tuple[int, ...]
    outputs: int
    groups: tuple[ParameterGroup, ...]
    steps_per_epoch: int
    steps: int
    batch: int
    part: int
    device: str
    devices: int
    memory: Memory
    notes: tuple[str, ...]


def run_preflight(model: nn.Module, data: Data, recipe: Recipe, world: World | None = None) -> Preflight:
    """Find out whether a run can begin, with two samples and no step.

    Args:
        model: is brought to its device and precision, and left as it is otherwise.

    Raises:
        ReparamError: network, data and recipe do not fit; one line says what.
    """
    world = world or World.current(recipe.device)
    augmentation(recipe, data)
    precision, objective = Precision.of(recipe, world.device), Objective.of(recipe, data)
    precision.hold(model)
    batch, part = batch_parts(recipe, data, world)
    outputs = check_network(model, data, objective, precision, part)
    steps_per_epoch = max(len(data.train) // recipe.batch_size, 1)
    steps = recipe.total_steps(steps_per_epoch)
    with trainable(model, recipe):
        groups = _groups(model, recipe)
        with _kept(model):
            memory = estimate(model, recipe, _loss(model.eval(), data, objective, precision), part)
    return Preflight(
        objective,
        data.shape,
        outputs,
        groups,
        steps_per_epoch,
        steps,
        batch,
        part,
        str(world.device),
        world.size,
        memory,
        tuple(remarks(recipe, groups, len(data.train), steps, steps / steps_per_epoch)),
    )


def check_network(model: nn.Module, data: Data, objective: Objective, precision: Precision, part: int) -> int:
    """See that a network takes the data's inputs and gives what is to be learned: the width of its output.

    Args:
        part: samples of one forward pass while training; two are tried, or one.

    Raises:
        DataError: it does not, or not while training.
        ReparamError: there is no memory even for that.
        ArchitectureError: no file can hold it, see ``records_of``.
    """
    records_of(model)
    inputs, _ = _samples(data, precision)
    shape = "x".join(map(str, data.shape))
    with _kept(model):
        result = _tried(model.eval(), inputs, precision, f"does not take inputs of {shape}, as the data has")
        width = objective.outputs(result).shape[1]
        model.train()
        result = _tried(
            model, inputs[:part], precision, f"cannot be trained on {min(part, 2)} of them at once"
        )
        objective.outputs(result)
    return width


def _tried(model: nn.Module, inputs: Tensor, precision: Precision, fault: str) -> Any:
    try:
        with torch.no_grad(), precision.autocast():
            return model(inputs)
    except Exception as error:  # whatever a user's forward raises
        if ran_out(error):
            told = f"out of memory on {precision.device} with {len(inputs)} sample(s): use a larger one"
            raise ReparamError(told) from error
        why = first_line(error)
        raise DataError(f"the network {fault}: {why}") from error


def augmentation(recipe: Recipe, data: Data) -> Augment | None:
    """The random changes to training images that a recipe asks for; None for none.

    Raises:
        DataError: the inputs are no images.
    """
    found = Augment(recipe.flip, recipe.crop, recipe.resized_crop)
    if not found:
        return None
    found.check(data.shape)
    return found


def batch_parts(recipe: Recipe, data: Data, world: World) -> tuple[int, int]:
    """Samples of an optimizer step, and the most of them that are in one forward pass.

    Raises:
        ReparamError: a forward pass would have none.
    """
    batch = min(recipe.batch_size, len(data.train))
    if recipe.accumulate > batch // world.size:
        raise ReparamError(
            f"--accumulate {recipe.accumulate}: a batch of {batch} samples on {world.size} device(s) has not so many "
            "parts: lower it"
        )
    return batch, -(-batch // world.size // recipe.accumulate)


@contextlib.contextmanager
def trainable(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Inside, only what the recipe trains takes gradients; afterwards, what did before.

    Raises:
        ReparamError: nothing would be trained.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if recipe.train:
            freeze_except(model, recipe.train)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's modes and running statistics are what they were, and so are random numbers."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _samples(data: Data, precision: Precision) -> tuple[Tensor, Tensor]:
    """Two samples, or the only one twice."""
    inputs, targets = next(Batches(data, data.validation, batch_size=2, shuffle=False).epoch(0))
    both = torch.arange(2) % len(inputs)
    return precision.place(inputs[both]), precision.place(targets[both])


def _loss(
    model: nn.Module, data: Data, objective: Objective, precision: Precision
) -> Callable[[int], Tensor]:
    """The loss of the first one or two samples, with gradient."""
    inputs, targets = _samples(data, precision)

    def loss(count: int) -> Tensor:
        # Copies: what is kept is counted by the memory it lies in.
        with precision.autocast():
            outputs = objective.outputs(model(inputs[:count].clone()))
        return objective.loss_sum(outputs, targets[:count].clone())

    return loss


def _groups(model: nn.Module, recipe: Recipe) -> tuple[ParameterGroup, ...]:
    found = [
        ParameterGroup(
            group["kind"],
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
            group["lr"],
            group["weight_decay"],
        )
        for group in make_groups(model, recipe)
    ]
    kinds = parameter_kinds(model)
    frozen: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen.setdefault(kinds[name], []).append(parameter.numel())
    found += [ParameterGroup(kind, len(sizes), sum(sizes), None, None) for kind, sizes in frozen.items()]
    return tuple(sorted(found, key=lambda group: KINDS.index(group.kind)))
