"""Convert a checkpoint: plan from headers, look at the values the plan depends on, then write one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.checkpoint import folders
from reparam.checkpoint.layers import find_layers
from reparam.checkpoint.plan import FilePlan, Plan, make_plan
from reparam.checkpoint.reading import open_checkpoint
from reparam.checkpoint.report import ConversionReport, LayerReport
from reparam.checkpoint.selection import Selection, without_effect
from reparam.checkpoint.staging import refuse_existing, require_space, staged
from reparam.errors import OutputError, SelectionError

if TYPE_CHECKING:
    from reparam.checkpoint.fidelity import Fidelity

# Said of large checkpoints alone: others are done before the loops are loaded.
_SLOWER = "pip install 'reparam[fast]' for compiled loops, about twice as fast"

#: called with (bytes done, bytes in all, what is being done)
Progress = Callable[[int, int, str], None]


def convert_checkpoint(
    path: Path | str,
    to: str,
    *,
    output: Path | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layout: str | None = None,
    theta_dtype: str | None = None,
    exact: bool = False,
    axes: Mapping[str, int] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write a checkpoint in another parameterization, in bounded memory; the source is only read.

    Args:
        path: a checkpoint file, an index of shards, or a folder.
        to: "sp", "wn" or "gmp".
        output: file or folder to make; None for NAME.gmp.safetensors or NAME-gmp/ beside the input.
        include, exclude: globs over layer names; see :class:`Selection`.
        layout: names of weight normalization's tensors: "weight_norm" (default), "parametrizations" or "clip-gmp".
        theta_dtype: "float32" or "float64", of theta, r, lambda_ and g; None for float32, float64 beside float64.
        exact: leave a layer as it is where it would not convert back bit for bit.
        axes: unit axis by glob, where shapes do not tell.
        force: replace an existing output.
        dry_run: read headers, write nothing.
        progress: told at once, and of every part written.

    Returns:
        What was done with every tensor, and how exactly it converts back.

    Raises:
        ReparamError: bad input or options, or an output that cannot be written; nothing is left behind.
        CheckFailedError: the result would not give the source back; nothing is left behind.
    """
    began = time.perf_counter()
    checkpoint = open_checkpoint(path)
    selection = Selection(tuple(include), tuple(exclude))
    plan = make_plan(checkpoint, to, selection, layout, _stored(theta_dtype), axes)
    try:
        target = folders.output_path(checkpoint, to, None if output is None else Path(output))
    except OSError as error:
        raise OutputError(f"-o {output}: {error.strerror}") from error
    files = plan.files()
    notes = (*checkpoint.notes, *_idle_axes(plan, axes or {}))
    folders.refuse_in_place(checkpoint, target)
    if dry_run:
        return _report(plan, target, files, {}, began, notes, dry_run=True)
    refuse_existing(target, force)
    folders.refuse_losing(checkpoint, target)

    from reparam.checkpoint import running

    if progress is not None:
        progress(0, sum(file.nbytes for file in files.values()), "preparing")
    with running.fast(plan) as backend:
        plan = running.decide(plan, exact)
        files = plan.files()
        total = sum(file.nbytes for file in files.values())
        require_space(target, total + folders.companions_size(checkpoint))
        with staged(target, force) as temporary:
            folders.prepare(checkpoint, temporary)
            places = {source: folders.file_in(checkpoint, temporary, source) for source in files}
            fidelity = running.write(checkpoint, files, places, progress)
            folders.finish(checkpoint, temporary, files)
    if backend.instead is not None:
        notes = (*notes, f"{_SLOWER} ({backend.instead})")
    mapped = any("gmp" in step.forms for step in plan.converted)
    return _report(plan, target, files, fidelity, began, notes, backend=backend.name if mapped else None)


def _idle_axes(plan: Plan, axes: Mapping[str, int]) -> Sequence[str]:
    if not axes:
        return ()
    converted = [step.layer for step in plan.converted]
    return tuple(without_effect(axes, converted, find_layers(plan.checkpoint).layers).values())


def _stored(theta_dtype: str | None) -> str | None:
    known = {None: None, "float32": "F32", "float64": "F64"}
    if theta_dtype not in known:
        raise SelectionError(
            f"--theta-dtype {theta_dtype}: float32 or float64; 16 bits cost a row error of 1.7e-3"
        )
    return known[theta_dtype]


def _report(
    plan: Plan,
    target: Path,
    files: Mapping[Path, FilePlan],
    fidelity: Mapping[str, Fidelity],
    began: float,
    notes: tuple[str, ...],
    dry_run: bool = False,
    backend: str | None = None,
) -> ConversionReport:
    layers = tuple(LayerReport.of(step, fidelity.get(step.layer.key)) for step in plan.steps)
    return ConversionReport(
        source=plan.checkpoint.path,
        output=target,
        to=plan.to,
        layers=layers,
        others=plan.others,
        bytes_before=sum(file.stat().st_size for file in plan.checkpoint.files),
        bytes_after=sum(file.nbytes for file in files.values()),
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
        notes=notes,
        backend=backend,
    )
