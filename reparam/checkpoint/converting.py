"""Convert a checkpoint: plan from headers, look at the values the plan depends on, then write one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.checkpoint import folders
from reparam.checkpoint.layers import Layer
from reparam.checkpoint.plan import CONVERTED, FilePlan, Plan, Step, make_plan, settle_ties
from reparam.checkpoint.reading import Checkpoint, open_checkpoint
from reparam.checkpoint.report import ConversionReport, LayerReport
from reparam.checkpoint.selection import Selection
from reparam.checkpoint.staging import refuse_existing, require_space, staged
from reparam.checkpoint.writing import SafetensorsWriter
from reparam.errors import NonFiniteError, OutputError, SelectionError

if TYPE_CHECKING:
    from torch import Tensor

    from reparam.checkpoint.mapping import Block, Fidelity

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
        progress: told of every tensor written.

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
    folders.refuse_in_place(checkpoint, target)
    if dry_run:
        return _report(plan, target, files, {}, began, dry_run=True)
    refuse_existing(target, force)
    folders.refuse_losing(checkpoint, target)

    from reparam.checkpoint.mapping import worker_threads

    fidelity: dict[str, Fidelity] = {}
    with worker_threads() as pool:
        plan = _decide(plan, exact, pool)
        files = plan.files()
        total = sum(file.nbytes for file in files.values())
        require_space(target, total + folders.companions_size(checkpoint))
        tell = _Teller(total, progress)
        with staged(target, force) as temporary:
            folders.prepare(checkpoint, temporary)
            for file in files.values():
                place = folders.file_in(checkpoint, temporary, file.source)
                place.parent.mkdir(parents=True, exist_ok=True)
                _write_file(checkpoint, file, place, pool, fidelity, tell)
            folders.finish(checkpoint, temporary, files)
    return _report(plan, target, files, fidelity, began, dry_run=False)


def _stored(theta_dtype: str | None) -> str | None:
    known = {None: None, "float32": "F32", "float64": "F64"}
    if theta_dtype not in known:
        raise SelectionError(
            f"--theta-dtype {theta_dtype}: float32 or float64; 16 bits cost a row error of 1.7e-3"
        )
    return known[theta_dtype]


class _Teller:
    """Adds up bytes for the progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, nbytes: int, what: str) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, what)


class _LayerSource:
    """Reads a layer's tensors, whole or in blocks of rows."""

    def __init__(self, checkpoint: Checkpoint, layer: Layer) -> None:
        self._checkpoint, self._layer = checkpoint, layer
        infos = [checkpoint.tensors[key] for key in layer.tensors.values()]
        leading = layer.spec.leading
        self.divisible = all(
            info.stride is None and info.shape and info.shape[0] and info.shape[0] % leading == 0
            for info in infos
        )

    def __call__(self, block: Block) -> dict[str, Tensor]:
        if block.count == block.leading:
            return {role: self._checkpoint.tensor(key) for role, key in self._layer.tensors.items()}
        return {
            role: self._checkpoint.rows(key, *block.rows(self._checkpoint.tensors[key].shape[0]))
            for role, key in self._layer.tensors.items()
        }


def _decide(plan: Plan, exact: bool, pool: ThreadPoolExecutor) -> Plan:
    """Settle what headers cannot tell: whether λ is usable, and with ``exact`` whether a layer comes back exactly."""
    steps = tuple(_decided(plan.checkpoint, step, exact, pool) for step in plan.steps)
    if not any(step.status == CONVERTED for step in steps):
        raise SelectionError(
            f"{plan.checkpoint.path}: --exact leaves nothing to convert; try --theta-dtype float64"
        )
    return replace(plan, steps=settle_ties(steps))


def _decided(checkpoint: Checkpoint, step: Step, exact: bool, pool: ThreadPoolExecutor) -> Step:
    from reparam.checkpoint.mapping import bias_role, blocks, map_layer

    layer, record = step.layer, step.record
    if record is None or record.kind == "sp" or not (exact or record.bias == "lambda_"):
        return step
    read = _LayerSource(checkpoint, layer)
    parts = blocks(layer.spec, read.divisible)
    with _naming(checkpoint, layer):
        if record.bias is not None:
            record = replace(record, bias=bias_role(layer, record, parts, read, pool))
        if exact:
            found = map_layer(layer, record, parts, read, lambda block, tensors: None, pool)
            if count := found.inexact + found.bias_inexact:
                return step.skip(f"--exact: {count} values would not come back bit for bit")
    return replace(step, record=record)


@contextmanager
def _naming(checkpoint: Checkpoint, layer: Layer) -> Iterator[None]:
    """A bad value met within is reported with the file and the layer."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{checkpoint.path}: '{layer.weight_key}' holds {error}: mend it, or --exclude {layer.name}"
        ) from error


def _write_file(
    checkpoint: Checkpoint,
    plan: FilePlan,
    place: Path,
    pool: ThreadPoolExecutor,
    fidelity: dict[str, Fidelity],
    tell: _Teller,
) -> None:
    with SafetensorsWriter(place, plan.entries, plan.metadata) as writer:
        for step in plan.steps:
            with _naming(checkpoint, step.layer):
                fidelity[step.layer.key] = _write_layer(checkpoint, step, writer, plan, pool, tell)
        for key, source_key in plan.copies.items():
            writer.write_blocks(key, checkpoint.blocks(source_key))
            tell(writer.size(key), key)


def _write_layer(
    checkpoint: Checkpoint,
    step: Step,
    writer: SafetensorsWriter,
    plan: FilePlan,
    pool: ThreadPoolExecutor,
    tell: _Teller,
) -> Fidelity:
    from reparam.checkpoint.mapping import blocks, map_layer

    assert step.record is not None
    # A tied layer's weight tensors are not in the plan: they are written once, with their owner.
    keys = {role: key for role, (key, _, _) in step.outputs().items() if key in plan.entries}

    def write(block: Block, tensors: dict[str, Tensor]) -> None:
        for role, key in keys.items():
            if block.count == block.leading:
                writer.write(key, tensors[role])
            else:
                writer.write_rows(key, block.rows(plan.entries[key][1][0])[0], tensors[role])

    read = _LayerSource(checkpoint, step.layer)
    fidelity = map_layer(step.layer, step.record, blocks(step.layer.spec, read.divisible), read, write, pool)
    tell(sum(writer.size(key) for key in keys.values()), step.layer.name)
    return fidelity


def _report(
    plan: Plan,
    target: Path,
    files: Mapping[Path, FilePlan],
    fidelity: Mapping[str, Fidelity],
    began: float,
    dry_run: bool,
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
        notes=plan.checkpoint.notes,
    )
