"""Carrying a plan out: what headers left open is decided by the values, then every file is written.

Both run over tasks, some blocks of one layer each, which worker processes take one by one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from reparam.checkpoint.cutting import Block
from reparam.checkpoint.fidelity import Fidelity
from reparam.checkpoint.layers import Layer
from reparam.checkpoint.mapping import bias_roles, blocks, cut_axes, map_block
from reparam.checkpoint.metadata import LayerRecord
from reparam.checkpoint.plan import CONVERTED, FilePlan, Plan, Step, settle_ties
from reparam.checkpoint.reading import Checkpoint
from reparam.checkpoint.source import Source, divisible, whereabouts
from reparam.checkpoint.workers import each
from reparam.checkpoint.writing import SafetensorsWriter
from reparam.errors import NonFiniteError, SelectionError
from reparam.kernels.backend import REFERENCE, Backend, compiled_conversion

if TYPE_CHECKING:
    from reparam.checkpoint.converting import Progress

# Blocks of one task: enough that handing it out costs nothing beside it, few enough to keep all workers busy.
_BLOCKS = 4
# Seconds between two rounds of bringing to disk what was written so far.
_FLUSH = 0.05
# Bytes to write from which on worker processes are worth their start.
_WORTHWHILE = 1 << 25
# Bytes to read from which on the compiled loops of GmP's map are worth the half second that they take to load.
_WORTH_LOADING = 1 << 28


@dataclass(frozen=True)
class _Task:
    """A part of one layer."""

    step: Step
    block: Block

    @property
    def record(self) -> LayerRecord:
        assert self.step.record is not None
        return self.step.record

    def source(self, checkpoint: Checkpoint, norms: dict[str, Tensor]) -> Source:
        """Reads what is to be mapped; ``norms`` are those known in this process."""
        axes = cut_axes(self.step.layer, self.record)
        return Source(checkpoint, self.step.layer, self.block, axes, norms)


#: the file of the source whose place is written, and what into it: blocks of a layer, or the copy of a key
_Job = tuple[Path, _Task | str]


def fast(plan: Plan) -> AbstractContextManager[Backend]:
    """Carry a plan out within this, for compiled loops where they are worth their start; gives what maps."""
    worthwhile = plan.checkpoint.nbytes >= _WORTH_LOADING and any("gmp" in step.forms for step in plan.steps)
    return compiled_conversion() if worthwhile else nullcontext(REFERENCE)


def decide(plan: Plan, exact: bool) -> Plan:
    """Settle what headers cannot tell: whether λ is usable, and with ``exact`` whether a layer comes back exactly.

    Raises:
        NonFiniteError: a weight or bias is NaN or Inf.
        SelectionError: nothing is left to convert.
    """
    checkpoint = plan.checkpoint
    parallel = checkpoint.nbytes >= _WORTHWHILE
    norms: dict[str, Tensor] = {}

    def role(task: _Task) -> set[str]:
        with _naming(checkpoint, task.step.layer):
            return bias_roles(task.step.layer, task.record, task.block, task.source(checkpoint, norms))

    def trial(task: _Task) -> Fidelity:
        with _naming(checkpoint, task.step.layer):
            source = task.source(checkpoint, norms)
            return map_block(task.step.layer, task.record, task.block, source, lambda block, tensors: None)

    def inexact(steps: Iterable[Step]) -> Counter[str]:
        """By layer key, how many values would not come back bit for bit."""
        tasks = _tasks(checkpoint, [s for s in steps if s.record is not None and s.record.kind != "sp"])
        found: Counter[str] = Counter()
        for i, fidelity in each(trial, tasks, parallel):
            found[tasks[i].step.layer.key] += fidelity.inexact + fidelity.bias_inexact
        return +found

    steps = {step.layer.key: step for step in plan.steps}
    kept_plain = set()
    tasks = _tasks(checkpoint, [s for s in plan.steps if s.record is not None and s.record.bias == "lambda_"])
    for i, roles in each(role, tasks, parallel):
        if "bias" in roles:
            kept_plain.add(tasks[i].step.layer.key)
    for key in kept_plain:
        record = steps[key].record
        assert record is not None
        steps[key] = replace(steps[key], record=replace(record, bias="bias"))
    helped: set[str] = set()
    if exact:
        found = inexact(steps.values())
        helped = found.keys() - inexact(_in_float64(steps[key]) for key in found).keys()
        for key, count in found.items():
            mend = "; with --theta-dtype float64 all would" if key in helped else ""
            steps[key] = steps[key].skip(f"--exact: {count} values would not come back bit for bit{mend}")
    if not any(step.status == CONVERTED for step in steps.values()):
        mend = "try --theta-dtype float64" if helped else "leave --exact out"
        raise SelectionError(f"{checkpoint.path}: --exact leaves nothing to convert; {mend}")
    return replace(plan, steps=settle_ties(tuple(steps.values())))


def _in_float64(step: Step) -> Step:
    """The same with all that it derives held in float64."""
    assert step.record is not None
    return replace(step, record=replace(step.record, spec=replace(step.record.spec, stored="F64")))


def write(
    checkpoint: Checkpoint,
    files: Mapping[Path, FilePlan],
    places: Mapping[Path, Path],
    progress: Progress | None,
) -> dict[str, Fidelity]:
    """Write every file of a plan.

    Args:
        checkpoint: the source.
        files: by the source file each takes the place of.
        places: where each is written; folders are made.
        progress: told of every task done.

    Returns:
        By layer key, how exactly each converted layer gives the source back.

    Raises:
        NonFiniteError: a weight or bias is NaN or Inf.
        CheckFailedError: what was written does not give the source back.
    """
    fidelity: dict[str, Fidelity] = {}
    norms: dict[str, Tensor] = {}
    total, done = sum(file.nbytes for file in files.values()), 0
    with ExitStack() as stack:
        writers = {}
        for source, file in files.items():
            places[source].parent.mkdir(parents=True, exist_ok=True)
            writer = SafetensorsWriter(places[source], file.entries, file.metadata)
            writers[source] = stack.enter_context(writer)
        # Copies first: the largest are single tasks, and would keep one worker busy at the end. Files take turns:
        # a system lets only one process at a time write into a file.
        per_file: list[list[_Job]] = [
            [*((source, key) for key in file.copies), *((source, t) for t in _tasks(checkpoint, file.steps))]
            for source, file in files.items()
        ]
        tasks = [task for turn in zip_longest(*per_file) for task in turn if task is not None]

        def run(item: _Job) -> tuple[Counter[str], Fidelity]:
            source, task = item
            if isinstance(task, str):
                writers[source].write_blocks(task, checkpoint.blocks(files[source].copies[task]))
                return writers[source].taken(), Fidelity()
            with _naming(checkpoint, task.step.layer):
                found = _map(task, task.source(checkpoint, norms), writers[source], files[source].entries)
            return writers[source].taken(), found

        stack.enter_context(_flushing(list(writers.values())))
        for i, (written, found) in each(run, tasks, total >= _WORTHWHILE):
            source, task = tasks[i]
            writers[source].count(written)
            done += sum(written.values())
            if isinstance(task, _Task):
                key, name = task.step.layer.key, task.step.layer.name
                fidelity[key] = fidelity.get(key, Fidelity()) + found
            else:
                name = task
            if progress is not None:
                progress(done, total, name)
    return fidelity


def _tasks(checkpoint: Checkpoint, steps: Sequence[Step]) -> list[_Task]:
    """All blocks of all layers."""
    tasks = []
    for step in steps:
        assert step.record is not None
        whole = not divisible(checkpoint, step.layer)
        parts = [Block.whole(step.layer.spec)] if whole else blocks(step.layer, step.record, _BLOCKS)
        tasks += [_Task(step, part) for part in parts]
    return tasks


def _map(
    task: _Task,
    source: Source,
    writer: SafetensorsWriter,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Fidelity:
    # A tied layer's weight tensors are not in the plan: they are written once, with their owner.
    keys = {role: key for role, (key, _, _) in task.step.outputs().items() if key in entries}

    def put(block: Block, tensors: dict[str, Tensor]) -> None:
        for role, key in keys.items():
            part = block.part(role, entries[key][1])
            if part is not None:
                writer.write_part(key, *part, tensors[role])

    return map_block(task.step.layer, task.record, task.block, source, put)


@contextmanager
def _flushing(writers: Sequence[SafetensorsWriter]) -> Iterator[None]:
    """Meanwhile have what is written brought to disk, so that not all of it has to wait for the end."""
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH):
            for writer in writers:
                writer.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _naming(checkpoint: Checkpoint, layer: Layer) -> Iterator[None]:
    """A bad value met within is reported with the file, the layer, and where it is."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{checkpoint.path}: '{layer.weight_key}' holds {error}{whereabouts(checkpoint, layer)}: "
            f"mend it, or --exclude {layer.name}"
        ) from error
