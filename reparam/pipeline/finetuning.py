"""Fine-tuning: a network and its checkpoint, or new values, trained on a dataset into the folder of a run.

network → (convert) → (new values) → preflight → skeleton → train → curves
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.errors import CheckFailedError, ReparamError, SelectionError

# Stages are imported where they run: commands that read headers must not wait for torch.
if TYPE_CHECKING:
    from torch import Tensor, nn

    from reparam.training import Event, Preflight, Recipe, RunFolder, TrainingResult
    from reparam.training.data import Data
    from reparam.training.distributed import World

#: samples that data-dependent values and running means are taken from at most
_FIRST_LOOK = 1024
#: classes that are named in a note
_NAMED = 12


@dataclass(frozen=True)
class FinetuneRun:
    """What a run left.

    Attributes:
        folder: of the run.
        best, last: checkpoints of the best and of the latest weights, held as the network is trained.
        result: how it went.
        curves: a plot of loss and metric; None where matplotlib is not installed.
    """

    folder: Path
    best: Path
    last: Path
    result: TrainingResult
    curves: Path | None


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
        path: a checkpoint in any parameterization; None starts from new values, ``recipe.scratch``.
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
    from reparam.training.data import Augment, load_data
    from reparam.training.distributed import World

    if path is None and not recipe.scratch:
        raise ReparamError(
            "nothing to fine-tune: give a checkpoint, or --scratch for a network with new values"
        )
    if path is not None and recipe.scratch and recipe.init is None:
        raise ReparamError(
            f"--scratch: {path} has values: say what replaces them (--init paper), or give --arch alone"
        )
    world = World.current(recipe.device)
    with _seeded(recipe.seed):
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
    augment = Augment(recipe.flip, recipe.crop, recipe.resized_crop)
    if augment != Augment():
        augment.check(dataset.shape)
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
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "classes": list(dataset.classes),
    }
    every = (*notes, *converted, *dataset.notes, *_class_order(dataset.classes), *preflight.notes)
    return Setup(model, dataset, recipe, state_of, preflight, every, described, world)


def run_finetune(
    setup: Setup,
    out: Path | str,
    *,
    resume: bool = False,
    force: bool = False,
    tell: Callable[[Event], None] | None = None,
    note: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FinetuneRun:
    """Train, into the folder of a run.

    Args:
        setup: of :func:`set_up`.
        out: the folder, see :class:`reparam.training.RunFolder`; made if missing.
        resume: go on with the run in ``out``, exactly as if it had never been stopped.
        force: replace the run in ``out``.
        tell: called with every event, in the first process only.
        note: called with what turns out on the way.
        stop: asked in every step whether to save and return.

    Raises:
        ReparamError: ``out`` holds another run, or cannot be written.
        CheckFailedError: training diverged; the last good checkpoint is in ``out``.
    """
    from reparam.training import RunFolder, State, train

    run, world = RunFolder(out), setup.world
    state = None
    if resume and run.state.exists():
        state = State.load(run.state)
        state.check(setup.recipe, setup.data)
        _check_same_network(run, setup)
    elif world.is_main:
        # A run that was killed before its first save has nothing to go on from, and nothing to lose.
        run.check(force or (resume and run.config.exists()))
    world.barrier()
    if world.is_main and state is None:
        run.create(force or resume)
        run.write_config(setup.recipe, setup.described)
        _write_skeleton(setup, run.skeleton, note or (lambda text: None))
    world.barrier()
    result = train(
        setup.model,
        setup.data,
        setup.recipe,
        run,
        world=world,
        resume=state,
        state_of=setup.state_of,
        tell=tell,
        stop=stop,
    )
    if world.is_main and resume:
        run.write_config(setup.recipe, setup.described)
    curves = _plot(run) if world.is_main else None
    return FinetuneRun(run.path, run.best, run.last, result, curves)


def finetune(
    path: Path | str | None,
    arch: str | None,
    data: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    arch_args: Mapping[str, str] | None = None,
    val_path: Path | str | None = None,
    to: str | None = None,
    mean_norm: bool = False,
    fold_bn: bool = False,
    resume: bool = False,
    force: bool = False,
    tell: Callable[[Event], None] | None = None,
) -> FinetuneRun:
    """Fine-tune a checkpoint: :func:`set_up`, then :func:`run_finetune`, with their arguments.

    Args:
        recipe: how to train; the defaults of :class:`reparam.training.Recipe` without.

    Raises:
        ReparamError: bad input, found before the first step.
        CheckFailedError: training diverged; the last good checkpoint is in ``out``.
    """
    from reparam.training import Recipe

    setup = set_up(
        None if path is None else Path(path),
        arch,
        str(data),
        recipe or Recipe(),
        arch_args=arch_args,
        val_path=None if val_path is None else str(val_path),
        to=to,
        mean_norm=mean_norm,
        fold_bn=fold_bn,
    )
    try:
        return run_finetune(setup, out, resume=resume, force=force, tell=tell)
    finally:
        setup.world.close()


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
    done = Counter(dict.fromkeys(asked, 0)) + Counter(rule.rule for rule in rules if rule.applied)
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


def _write_skeleton(setup: Setup, path: Path, note: Callable[[str], None]) -> None:
    """The graph that a run's checkpoints are exported with; a network that has none can still be trained."""
    import copy

    from reparam.graph import InputSpec
    from reparam.pipeline.exporting import export_skeleton
    from reparam.training.data import Batches

    inputs, _ = next(Batches(setup.data, setup.data.validation, batch_size=1, shuffle=False).epoch(0))
    spec = InputSpec("input", ("N", *setup.data.shape), str(inputs.dtype).removeprefix("torch."))
    model = copy.deepcopy(setup.model).float().eval()
    try:
        export_skeleton(model, [spec], path)
    except CheckFailedError as error:
        note(f"no skeleton for exports without --arch: {error}")


def _check_same_network(run: RunFolder, setup: Setup) -> None:
    """Raise ReparamError where the run was of another network, as far as the command says it."""
    before = run.network()
    for name in ("arch", "arch_args", "to", "mean_norm", "fold_bn"):
        was, now = before.get(name), setup.described[name]
        # A file may lie elsewhere by now.
        if name == "arch" and was and now:
            was, now = (str(ref).rpartition("/")[2] for ref in (was, now))
        if was != now:
            raise ReparamError(
                f"{run.path}: the run has --{name.replace('_', '-')} {was}, not {now}: it can only go on as it began"
            )


def _plot(run: RunFolder) -> Path | None:
    from reparam.training.curves import plot_curves

    with contextlib.suppress(ModuleNotFoundError):
        return plot_curves(run.metrics, run.path / "curves.png")
    return None


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, random numbers are those of ``seed``; the caller's are not disturbed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
