"""A run, from its start or a state to its end: what is around the loop, and what stops it told in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from reparam.errors import ReparamError, first_line
from reparam.training.data.randomness import seeded
from reparam.training.distributed import World
from reparam.training.events import Event, TrainingResult
from reparam.training.loop import Loop
from reparam.training.memory import ran_out
from reparam.training.preflight import trainable
from reparam.training.recipe import Recipe
from reparam.training.run_folder import RunFolder
from reparam.training.saving import StateOf
from reparam.training.state import State

if TYPE_CHECKING:
    from reparam.training.data.types import Data


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    run: RunFolder,
    *,
    world: World | None = None,
    resume: State | None = None,
    state_of: StateOf | None = None,
    tell: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train a model in place, in the parameterization it is held in.

    The same arguments give the same weights, bit for bit, on one machine's CPU with one thread count, whether or not
    the run was stopped or killed and resumed in between. The caller's random numbers are not disturbed.

    Args:
        model: is brought to its device and precision, and left there in evaluation mode with the last step's weights;
            where the recipe asks for a moving average, the files hold the average. Frozen parameters stay frozen.
        data: training and validation split.
        recipe: see ``Recipe``.
        run: a folder that ``create`` made; only rank 0 writes.
        world: the processes of this run; those of torchrun without.
        resume: the state to go on from, ``State.load(run.state)``.
        state_of: what the files hold of the model, in their element types; its state_dict without.
        tell: called with every event, on rank 0 only.
        stop: asked in every step; once it is true on some rank the run saves its state and returns.

    Raises:
        ReparamError: model, data and recipe do not fit, or memory is too small: the message says what would fit.
        CheckFailedError: training diverged; the message names the last good checkpoint.
        OutputError: the run folder cannot be written.
    """
    world = world or World.current(recipe.device)
    devices = [world.device] if world.device.type == "cuda" else []
    with (
        world.together(),
        trainable(model, recipe),
        torch.random.fork_rng(devices=devices),
        seeded(recipe.seed),
    ):
        loop = Loop(model, data, recipe, run, world, state_of, tell, stop)
        try:
            return loop.run(resume)
        except RuntimeError as error:
            if recipe.compile and _of_compiler(error):
                why = first_line(error)
                raise ReparamError(
                    f"--compile: torch cannot compile the network ({why}): leave it out"
                ) from error
            if not ran_out(error):
                raise
        finally:
            model.eval()
        # Out of memory, and what the failed step held is free now that its exception is gone.
        raise loop.out_of_memory()


def _of_compiler(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
