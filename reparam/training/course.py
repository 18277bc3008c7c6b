"""What changes from step to step while a run trains: taken down as a state, and taken up from one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from reparam.errors import CheckpointError
from reparam.training.averaging import Average
from reparam.training.groups import make_groups
from reparam.training.objective import Objective
from reparam.training.recipe import Recipe
from reparam.training.schedule import EarlyStop, Schedule
from reparam.training.state import Progress, State, described

if TYPE_CHECKING:
    from reparam.training.data.types import Data


@dataclass
class Course:
    """The parts of a run that have a state.

    Attributes:
        average: None where the recipe asks for none.
        scaler: of fp16's loss; disabled otherwise.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    early_stop: EarlyStop
    average: Average | None
    scaler: torch.amp.GradScaler
    progress: Progress

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, objective: Objective, total: int) -> Course:
        """A run of ``total`` steps before the first; the model is on its device."""
        schedule = Schedule(
            recipe.schedule,
            total,
            recipe.warmup,
            recipe.min_lr,
            recipe.patience,
            recipe.factor,
            objective.better,
        )
        return cls(
            model,
            _optimizer(model, recipe),
            schedule,
            EarlyStop(recipe.early_stop, objective.better),
            None if recipe.ema is None else Average(model, recipe.ema),
            torch.amp.GradScaler(enabled=recipe.amp == "fp16"),
            Progress(),
        )

    def state(self, recipe: Recipe, data: Data, metrics: dict[str, int]) -> State:
        """Taken down, with what says which run it is of; ``metrics`` are the bytes of the metrics files."""
        return State(
            recipe=recipe.model_dump(mode="json"),
            data=described(data),
            progress=self.progress.state_dict(),
            model={**self.model.state_dict(), **_unsaved(self.model)},
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            early_stop=self.early_stop.state_dict(),
            average=self.average.state_dict() if self.average is not None else {},
            scaler=self.scaler.state_dict(),
            metrics=metrics,
        )

    def take_up(self, state: State, recipe: Recipe) -> None:
        """Go on where ``state`` was taken down.

        Raises:
            CheckpointError: it is of another network.
        """
        unsaved = _unsaved(self.model)
        own = {**self.model.state_dict(), **unsaved}
        shapes = [{key: t.shape for key, t in held.items()} for held in (own, state.model)]
        odd = [key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key)]
        if odd:
            raise CheckpointError(f"{state.file}: is of another network: `{odd[0]}` differs")
        self.model.load_state_dict({k: t for k, t in state.model.items() if k not in unsaved})
        for key, buffer in unsaved.items():
            buffer.copy_(state.model[key])
        try:
            self.optimizer.load_state_dict(state.optimizer)
        except ValueError as error:
            raise CheckpointError(
                f"{state.file}: other parameters are trained than before ({error})"
            ) from error
        self.schedule.load_state_dict(state.schedule)
        self.early_stop.load_state_dict(state.early_stop)
        if self.average is not None:
            self.average.load_state_dict(state.average)
        self.scaler.load_state_dict(state.scaler)
        self.progress = Progress.from_state_dict(state.progress)
        # Whoever asks for more patience than the run that stopped early wants it to go on.
        if recipe.early_stop != state.recipe["early_stop"]:
            self.progress.stopped = False

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model holds its average, where there is one: what is evaluated and saved."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped(self.model)


def _unsaved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a state_dict leaves out, which training may change all the same."""
    saved = model.state_dict()
    return {key: buffer for key, buffer in model.named_buffers() if key not in saved}


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = make_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=recipe.lr, betas=recipe.betas)
