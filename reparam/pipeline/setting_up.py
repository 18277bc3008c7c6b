"""What comes before a run's first step: network, data and recipe, brought together and found to fit.

network → (convert) → (new values) → preflight
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.errors import ReparamError, SelectionError
from reparam.pipeline.runs import arch_args_of, checkpoint_of

# Stages are imported where they run: commands that read headers must not wait for torch.
if TYPE_CHECKING:
    from torch import Tensor, nn

    from reparam.training import Preflight, Recipe
    from reparam.training.data import Data
    from reparam.training.distributed import World

#: samples that data-dependent values and running means are taken from at most
_FIRST_LOOK = 1024
#: classes that are named in a note
_NAMED = 12


@dataclass(frozen=True)
class Setup:
    """A run that could begin: network, data and recipe, which fit.

    Attributes:
        model: held as it is to be trained.
        state_of: what the files of the run hold of it.
        preflight: what is known before the first step.
        notes: what the user should know.
        described: for the run's config.yaml.
    """

    model: nn.Module
    data: Data
    recipe: Recipe
    state_of: Callable[[nn.Module], Mapping[str, Tensor]] | None
    preflight: Preflight
    notes: tuple[str, ...]
    described: dict[str, Any]
    world: World


def set_up(
    path: Path | None,
    arch: str | None,
    data: str,
    recipe: Recipe,
    *,
    arch_args: Mapping[str, str] | None = None,
    val_path: str | None = None,
    to: str | None = None,
    mean_norm: bool = False,
    fold_bn: bool = False,
) -> Setup:
    """Everything that comes before the first step, writing nothing.

    Args:
        path: a checkpoint in any parameterization, or a run's folder, whose best is meant; None starts from new values, ``recipe.scratch``.
        arch, arch_args: its network, as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face
            folder.
        data, val_path: as :func:`reparam.training.data.load_data` takes them.
        recipe: how to train.
        to, mean_norm, fold_bn: convert first, as :func:`reparam.graph.convert` does; means are calibrated on the
            training data.

    Raises:
        ReparamError: something cannot be read, or does not fit.
    """
    from reparam.training import run_preflight
    from reparam.training.data import load_data
    from reparam.training.data.randomness import seeded
    from reparam.training.distributed import World

    if path is None and not recipe.scratch:
        raise ReparamError(
            "nothing to fine-tune: give a checkpoint, or --scratch for a network with new values"
        )
    if path is not None and recipe.scratch and recipe.init is None:
        raise ReparamError(
            f"--scratch: {path} has values: say what replaces them (--init paper), or give --arch alone"
        )
    path = checkpoint_of(path)
    if path is not None:
        arch_args = arch_args_of(path, arch, arch_args)
    world = World.current(recipe.device)
    with seeded(recipe.seed):
        model, state_of, notes = _network(path, arch, arch_args)
        dataset = load_data(
            data,
            task=recipe.task,
            validation=recipe.validation,
            seed=recipe.seed,
            size=recipe.size,
            inputs=recipe.inputs,
            target=recipe.target or None,
            normalize=recipe.normalize,
            mean=recipe.mean,
            std=recipe.std,
            val_path=val_path,
        )
        model, converted = _converted(model, to, mean_norm, fold_bn, dataset, recipe)
        if recipe.init is not None:
            _start_anew(model, recipe, dataset)
    preflight = run_preflight(model, dataset, recipe, world)
    described = {
        "checkpoint": None if path is None else str(path),
        "arch": arch,
        "arch_args": dict(arch_args or {}),
        "to": to,
        "mean_norm": mean_norm,
        "fold_bn": fold_bn,
        "data": data,
        "val_path": val_path,
        "task": dataset.task,
        "input": list(dataset.shape),
        "input_dtype": _dtype(dataset),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "classes": list(dataset.classes),
    }
    every = (*notes, *converted, *dataset.notes, *_class_order(dataset.classes), *preflight.notes)
    return Setup(model, dataset, recipe, state_of, preflight, every, described, world)


def _dtype(data: Data) -> str:
    """What a network gets, as ``--input`` names it."""
    from reparam.training.data import Batches

    inputs, _ = next(Batches(data, data.validation, batch_size=1, shuffle=False).epoch(0))
    return str(inputs.dtype).removeprefix("torch.")


def _class_order(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Which output is which class, unless their names are their numbers."""
    if list(classes) == [str(i) for i in range(len(classes))]:
        return ()
    few = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:_NAMED]))
    more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
    return (f"classes: {few}{more}",)


def _network(
    path: Path | None, arch: str | None, arch_args: Mapping[str, str] | None
) -> tuple[nn.Module, Callable[[nn.Module], Mapping[str, Tensor]] | None, tuple[str, ...]]:
    """The network, what files hold of it, and notes."""
    from dataclasses import replace

    from reparam.graph import load_architecture
    from reparam.pipeline.loading import load_network

    if path is None:
        if arch is None:
            raise ReparamError("--scratch: give the network with --arch file.py:fn")
        return load_architecture(arch, arch_args), None, ()
    network = load_network(path, arch, arch_args)
    # In the dtypes the file had, whatever the architecture computes in.
    return network.model, lambda model: replace(network, model=model).state_dict(), network.notes


def _converted(
    model: nn.Module, to: str | None, mean_norm: bool, fold_bn: bool, data: Data, recipe: Recipe
) -> tuple[nn.Module, tuple[str, ...]]:
    from reparam.graph import Outcome, convert

    if to is None:
        if mean_norm or fold_bn:
            option = "--mean-norm" if mean_norm else "--fold-bn"
            raise SelectionError(f"{option}: goes with a conversion: give --to gmp or --to wn too")
        return model, ()
    rules: list[Outcome] = []
    # New values have no means yet that could be calibrated: the running ones follow them.
    batches = _first_look(data, recipe) if mean_norm and not recipe.scratch else None
    model = convert(model, to, mean_norm=mean_norm, fold_bn=fold_bn, calibrate=batches, report=rules)
    asked = ["fold batch norm"] * fold_bn + ["mean normalization"] * mean_norm
    done = Counter(rule.rule for rule in rules if rule.applied)
    none = [f"{rule} nowhere" for rule in asked if rule not in done]
    return model, (
        f"converted to {to}: {', '.join([*(f'{rule} {count}×' for rule, count in done.items()), *none])}",
    )


def _start_anew(model: nn.Module, recipe: Recipe, data: Data) -> None:
    import torch

    from reparam.layers import init_model

    assert recipe.init is not None
    model.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    init_model(model, recipe.init, _first_look(data, recipe), generator)


def _first_look(data: Data, recipe: Recipe) -> Iterator[Tensor]:
    """The inputs of one large batch of training data, as the network gets them."""
    from reparam.training.data import Batches

    size = min(_FIRST_LOOK, len(data.train))
    inputs, _ = next(Batches(data, data.train, batch_size=size, shuffle=True, seed=recipe.seed).epoch(0))
    yield inputs
