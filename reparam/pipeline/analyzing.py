"""Characteristic activation boundaries of a checkpoint, of two, or of a run of fine-tuning.

| given | found |
|---|---|
| a checkpoint | ‖w‖ and λ of every unit, by its tensors; stability under a perturbation |
| and `arch` | batch norms folded in first; what follows each layer |
| and `data` | dead, always-on and active units, distance of the boundaries to the data |
| a second checkpoint | how far each boundary turned and moved |
| the folder of a run, with both | how many activation patterns changed between its checkpoints, per step |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.checkpoint import Checkpoint, open_checkpoint
from reparam.errors import ReparamError
from reparam.pipeline.loading import describes_network, load_network
from reparam.pipeline.moments import patterns_of, plain
from reparam.pipeline.runs import arch_args_of, arch_hint
from reparam.pipeline.seen import Inputs, inputs_of, require_no_options, require_taken

# Stages are imported where they run: commands that read headers must not wait for torch.
if TYPE_CHECKING:
    from torch import nn

    from reparam.analysis import Analysis, ModelAnalysis
    from reparam.analysis.patterns import PatternChange
    from reparam.analysis.units import LayerUnits
    from reparam.graph import InputSpec
    from reparam.training import RunFolder

#: perturbations that stability is looked at under
EPSILONS = (1e-3, 1e-2, 1e-1)


def analyze(
    path: Path | str,
    other: Path | str | None = None,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, str] | None = None,
    data: Path | str | None = None,
    specs: Sequence[InputSpec | str] = (),
    samples: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    epsilons: Sequence[float] = EPSILONS,
    axes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Analysis:
    """Look at the boundary {x : uᵀx + λ = 0} of every unit (Chen & Ge): where it lies, and what it cuts of the data.

    Args:
        path: a checkpoint in any parameterization, or the folder of a run, whose best weights are meant.
        other: a second one of the same network, to see how far each boundary turned and moved.
        arch, arch_args: the network, as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face folder
            with ``data``, or for tensors alone.
        data: a dataset as :func:`reparam.training.data.load_data` takes it, whose training part is looked at; an array of
            inputs, FILE or FILE:NAME; with ``specs`` a file of tensors by the names of the inputs. A run's own without.
        specs: inputs, as ``--input`` has them, of a network that takes several or other than floats.
        samples: of the data, drawn with ``seed``; 1000 without.
        mean, std: by which the dataset's inputs are normalized; a run's own, or measured, without.
        epsilons: perturbations, each above 0.
        axes: unit axes by glob, where tensors alone do not tell them.
        seed: of the samples, and of the signs of perturbations.

    Raises:
        ReparamError: bad input or options.
        NonFiniteError: a weight or a pre-activation is NaN or Inf.
    """
    from reparam.analysis import Analysis
    from reparam.analysis.comparison import compare

    _check(epsilons, samples)
    given = [_given(Path(p)) for p in (path, other) if p is not None]
    run = next((one.run for one in given if one.run is not None), None)
    networks = arch is not None or (
        data is not None and all(describes_network(open_checkpoint(one.weights)) for one in given)
    )
    if not networks:
        if data is not None:
            raise ReparamError("--data: what each layer sees of it takes the network: give --arch file.py:fn")
        require_no_options(specs, samples, mean, std)
        _require_axes(given, axes or {})
        models = [_of_tensors(one, given, axes) for one in given]
    else:
        if axes:
            raise ReparamError("--axis: for tensors alone; the network tells which axis its units are on")
        if run is not None:
            arch_args = arch_args_of(run.path, arch, arch_args)
        models = [_of_network(one, arch, arch_args) for one in given]
    inputs = None
    if networks:
        inputs = inputs_of(data, run, specs, samples, seed, mean, std)
    if inputs is not None:
        for model in models:
            assert model.network is not None
            require_taken(model.network, inputs)
    analyzed = tuple(_analyzed(model, epsilons, seed, inputs) for model in models)
    compared = compare(models[0].units, models[1].units) if len(models) > 1 else None
    if compared is not None:
        compared = replace(compared, others=compared.others | models[0].apart)
        if not compared.layers:
            why = next(iter(compared.others.items()), ("", "they hold no layers"))
            raise ReparamError(f"{path} and {other}: no layer can be compared: '{why[0]}': {why[1]}")
    patterns: tuple[PatternChange, ...] = ()
    if run is not None:
        patterns, notes = patterns_of(run, arch, arch_args, inputs)
        analyzed = (replace(analyzed[0], notes=analyzed[0].notes + notes), *analyzed[1:])
    if inputs is None:
        return Analysis(analyzed, compared, patterns)
    return Analysis(analyzed, compared, patterns, inputs.told, inputs.normalization)


@dataclass(frozen=True)
class _Given:
    """What a path means: weights, and the run they are the best of."""

    path: Path
    weights: Path
    run: RunFolder | None


@dataclass(frozen=True)
class _Model:
    """A model to analyze.

    Attributes:
        units: of its layers.
        network: plain, in evaluation mode; None by tensors alone.
        apart: layers that must not be compared with the other model's, with the reason.
    """

    path: Path
    units: list[LayerUnits]
    network: nn.Module | None
    notes: tuple[str, ...]
    apart: dict[str, str]


def _check(epsilons: Sequence[float], samples: int | None) -> None:
    for epsilon in epsilons:
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ReparamError(f"--epsilon {epsilon:g}: has to be a number above 0, such as 0.001")
    if len(set(epsilons)) < max(1, len(epsilons)):
        raise ReparamError("--epsilon: give each one once, and at least one")
    if samples is not None and samples < 1:
        raise ReparamError(f"--samples {samples}: has to be at least 1")


def _require_axes(given: Sequence[_Given], axes: Mapping[str, int]) -> None:
    from reparam.checkpoint.layers import find_layers
    from reparam.checkpoint.selection import Selection

    if axes:
        layers = [layer for one in given for layer in find_layers(open_checkpoint(one.weights), axes).layers]
        Selection().check(layers, tuple(axes))


def _given(path: Path) -> _Given:
    from reparam.training import RunFolder

    run = RunFolder(path)
    if not (path.is_dir() and run.exists):
        return _Given(path, path, None)
    if not run.best.is_file():
        raise ReparamError(f"{path}: a run that has saved no {run.best.name} yet: nothing to analyze")
    return _Given(path, run.best, run)


def _of_tensors(one: _Given, given: Sequence[_Given], axes: Mapping[str, int] | None) -> _Model:
    """By its tensors; names and unit axes agree with those of the other model."""
    from reparam.analysis.units import units_of_checkpoint
    from reparam.graph.arch import wrapper_prefix

    checkpoint = open_checkpoint(one.weights)
    others = [open_checkpoint(o.weights) for o in given if o is not one]
    told: dict[str, int] = {}
    prefix, apart = "", dict[str, str]()
    for other in others:
        prefix = wrapper_prefix(checkpoint.tensors, other.tensors)
        theirs = wrapper_prefix(other.tensors, checkpoint.tensors)
        # What a file records of its units settles what the other's shapes leave open.
        told = {
            prefix + key.removeprefix(theirs): record.spec.unit.axis for key, record in other.records.items()
        }
        told = {key: axis for key, axis in told.items() if key in checkpoint.tensors}
        apart = _apart(checkpoint, other, prefix, theirs)
    units, notes = units_of_checkpoint(checkpoint, told | dict(axes or {}))
    if not units:
        raise ReparamError(f"{one.weights}: holds no layer's weights: nothing to analyze")
    units = [replace(layer, name=layer.name.removeprefix(prefix)) for layer in units]
    if others:
        units = [layer for layer in units if layer.name not in apart]
    return _Model(one.path, units, None, (*checkpoint.notes, *notes, *_hint(one)), apart)


def _apart(checkpoint: Checkpoint, other: Checkpoint, prefix: str, theirs: str) -> dict[str, str]:
    """Layers into which a batch norm is folded in one of two files, which tensors alone cannot compare."""
    from reparam.checkpoint.dialects import layer_name

    def norms(one: Checkpoint, key: str) -> tuple[str, ...]:
        record = one.records.get(key)
        return () if record is None else record.batch_norms

    keys = [key.removeprefix(prefix) for key in checkpoint.records]
    keys += [key.removeprefix(theirs) for key in other.records]
    return {
        layer_name(key): "a batch norm is folded into one of the two: --arch folds both"
        for key in keys
        if norms(checkpoint, prefix + key) != norms(other, theirs + key)
    }


def _hint(one: _Given) -> tuple[str, ...]:
    """What a run could be analyzed for besides; its recorded architecture is told, never run."""
    if one.run is None:
        return ()
    options = arch_hint(one.path) or "--arch file.py:fn"
    return (f"{options} adds what the units do on the run's data, and how its patterns changed",)


def _of_network(one: _Given, arch: str | None, arch_args: Mapping[str, str] | None) -> _Model:
    from reparam.analysis.units import units_of_checkpoint, units_of_model
    from reparam.graph import records_of

    network = load_network(one.weights, arch, arch_args)
    held = {key: record.kind for key, record in records_of(network.model).items()}
    model, notes, folded = plain(network.model)
    lengths = {layer.name: layer.lengths for layer in units_of_checkpoint(network.checkpoint)[0]}
    # A batch norm that is folded in scales g.
    units = [
        layer if layer.name in folded else replace(layer, lengths=lengths.get(layer.name))
        for layer in units_of_model(model, held)
    ]
    if not units:
        raise ReparamError(f"--arch {arch}: the network has no layer with weights: nothing to analyze")
    return _Model(one.path, units, model, (*network.notes, *notes), {})


def _analyzed(model: _Model, epsilons: Sequence[float], seed: int, inputs: Inputs | None) -> ModelAnalysis:
    from reparam.analysis.model import analyze_units

    batches = None if inputs is None else inputs.batches
    return analyze_units(
        model.path, model.units, epsilons, seed, notes=model.notes, model=model.network, batches=batches
    )
