"""What a conversion will do, decided from headers: every tensor has a place in the output and a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reparam.checkpoint import dialects
from reparam.checkpoint import metadata as records_format
from reparam.checkpoint.layers import Layer, find_layers
from reparam.checkpoint.metadata import LayerRecord
from reparam.checkpoint.reading import Checkpoint
from reparam.checkpoint.selection import Selection
from reparam.checkpoint.writing import file_size
from reparam.errors import OutputError, SelectionError
from reparam.parameterizations import parameterization

_RESERVED = ("__metadata__", records_format.KEY)
CONVERTED, COPIED, SKIPPED = "converted", "copied", "skipped"


@dataclass(frozen=True)
class Step:
    """What becomes of one layer.

    Attributes:
        layer: as the source holds it.
        status: converted, copied (nothing to do) or skipped (left out by choice or necessity).
        reason: why.
        dialect: how a converted layer's tensors are named.
        record: how a converted layer is held in the output; None where its tensors only change their names.
    """

    layer: Layer
    status: str
    reason: str
    dialect: str = ""
    record: LayerRecord | None = None

    @property
    def forms(self) -> set[str]:
        """The parameterizations between which its values are mapped, if they are."""
        return set() if self.record is None else {self.layer.kind, self.record.kind}

    def outputs(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Role -> (key, element type, shape) of a converted layer's tensors."""
        assert self.record is not None
        specs = parameterization(self.record.kind).tensors(self.record.spec, self.record.bias)
        return {
            role: (dialects.key_of(self.dialect, self.layer.key, role), dtype, shape)
            for role, (dtype, shape) in specs.items()
        }

    def skip(self, reason: str) -> Step:
        return Step(self.layer, SKIPPED, reason)


@dataclass(frozen=True)
class FilePlan:
    """One output file.

    Attributes:
        source: the file it takes the place of.
        entries: its tensors: key -> (element type, shape).
        metadata: its ``__metadata__``.
        copies: key -> key of the source whose bytes it has.
        copied: key that owns the memory in the source -> key of its one copy; others of that memory are tied to it.
        steps: the layers that are converted into it.
    """

    source: Path
    entries: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return file_size(self.entries, self.metadata)


@dataclass(frozen=True)
class Plan:
    """The whole conversion of ``checkpoint`` to parameterization ``to``."""

    checkpoint: Checkpoint
    to: str
    steps: tuple[Step, ...]
    others: dict[str, str]

    @property
    def converted(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.status == CONVERTED)

    def files(self) -> dict[Path, FilePlan]:
        """Lay the output out, a file for each source file.

        Raises:
            OutputError: two tensors would have the same key.
        """
        plans = {file: FilePlan(file) for file in self.checkpoint.files}
        records: dict[Path, dict[str, LayerRecord]] = {file: {} for file in plans}
        renamed: dict[str, str] = {}
        for step in self.steps:
            file = self.checkpoint.tensors[step.layer.weight_key].file
            if step.status == CONVERTED:
                self._place(plans[file], step, renamed)
                if step.record is not None and step.record.kind != "sp":
                    records[file][step.layer.key] = step.record
            else:
                for key in step.layer.tensors.values():
                    self._copy(plans, key, renamed)
                if (record := self.checkpoint.records.get(step.layer.key)) is not None:
                    records[file][step.layer.key] = record
        for key in self.others:
            self._copy(plans, key, renamed)
        for file, plan in plans.items():
            plan.metadata.update(self.checkpoint.metadata.get(file, {}))
        self._tie(plans, renamed)
        for file, plan in plans.items():
            if records[file]:
                plan.metadata[records_format.KEY] = records_format.dump(records[file])
        return plans

    def _place(self, plan: FilePlan, step: Step, renamed: dict[str, str]) -> None:
        """Enter a converted layer's tensors; those it shares with the layer it is tied to become aliases."""
        outputs = self._relabelled(step) if step.record is None else step.outputs()
        for role, (key, dtype, shape) in outputs.items():
            if step.layer.tied_to is not None and role in dialects.WEIGHT_ROLES:
                renamed[key] = dialects.key_of(step.dialect, step.layer.tied_to, role)
                continue
            self._enter(plan, key, dtype, shape, f"layer {step.layer.name}")
            if step.record is None:
                plan.copies[key] = step.layer.tensors[role]
        if step.record is not None:
            plan.steps.append(step)

    def _relabelled(self, step: Step) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        infos = {role: self.checkpoint.tensors[key] for role, key in step.layer.tensors.items()}
        return {
            role: (dialects.key_of(step.dialect, step.layer.key, role), info.dtype, info.shape)
            for role, info in infos.items()
        }

    def _copy(self, plans: Mapping[Path, FilePlan], key: str, renamed: dict[str, str]) -> None:
        """Enter a copied tensor, or tie it to a copy of the same memory that is entered already."""
        info = self.checkpoint.tensors[key]
        owner = self.checkpoint.aliases.get(key, key)
        plan = plans[info.file]
        if owner in plan.copied:
            renamed[key] = plan.copied[owner]
            return
        self._enter(plan, key, info.dtype, info.shape, "a copied tensor")
        plan.copies[key] = key
        plan.copied[owner] = key

    def _enter(self, plan: FilePlan, key: str, dtype: str, shape: tuple[int, ...], what: str) -> None:
        if key in _RESERVED:
            raise OutputError(
                f"{self.checkpoint.path}: safetensors keeps the name '{key}' for itself: rename that tensor"
            )
        if key in plan.entries:
            raise OutputError(
                f"{self.checkpoint.path}: output key '{key}' collides: {what} and another tensor would both have it;"
                " --exclude one of them"
            )
        plan.entries[key] = (dtype, shape)

    def _tie(self, plans: Mapping[Path, FilePlan], renamed: Mapping[str, str]) -> None:
        """Record tied tensors as safetensors does: __metadata__ maps the key that is left out to the one that is kept."""
        for alias, key in renamed.items():
            plan = next(plan for plan in plans.values() if key in plan.entries)
            if alias in plan.metadata or alias in _RESERVED:
                raise OutputError(
                    f"{self.checkpoint.path}: tied tensor '{alias}' has a name that the file's metadata uses: rename it"
                )
            if any(alias in other.entries for other in plans.values()):
                raise OutputError(
                    f"{self.checkpoint.path}: output key '{alias}' collides: a tied layer and another tensor would both"
                    " have it; --exclude one of them"
                )
            plan.metadata[alias] = key


def make_plan(
    checkpoint: Checkpoint,
    to: str,
    selection: Selection,
    layout: str | None = None,
    stored: str | None = None,
    axes: Mapping[str, int] | None = None,
) -> Plan:
    """Decide from headers what becomes of every tensor.

    Args:
        checkpoint: the source.
        to: name of the target parameterization.
        selection: which layers.
        layout: dialect of weight normalization's names, None for torch's default.
        stored: element type of g, r, lambda_ and theta; None for float32 (float64 beside float64 weights).
        axes: unit axes by glob.

    Raises:
        SelectionError: nothing is selected, or an option does not fit.
        CheckpointError: metadata and tensors contradict each other.
    """
    target = parameterization(to)
    if target.needs_graph:
        raise SelectionError(f"--to {to}: {target.needs_graph}")
    if layout is not None and (to != "wn" or layout not in dialects.WEIGHT_NORM_DIALECTS):
        known = ", ".join(dialects.WEIGHT_NORM_DIALECTS)
        raise SelectionError(f"--layout {layout}: one of {known}, and only with --to wn")
    for key, record in checkpoint.records.items():
        if record.rewritten is not None:
            raise SelectionError(
                f"{checkpoint.path}: '{key}': {record.rewritten}: converting it takes the network, give it with --arch"
            )
    contents = find_layers(checkpoint, axes)
    selection.check(contents.layers, tuple(axes or ()))
    dialect = layout or dialects.DEFAULT_DIALECT[to]
    steps = settle_ties(
        [_step(layer, to, dialect, selection, stored, checkpoint) for layer in contents.layers]
    )
    if not any(step.status == CONVERTED for step in steps):
        raise SelectionError(f"{checkpoint.path}: nothing to convert to {to}: {_why_nothing(steps)}")
    return Plan(checkpoint, to, steps, contents.others)


def _step(
    layer: Layer, to: str, dialect: str, selection: Selection, stored: str | None, checkpoint: Checkpoint
) -> Step:
    if layer.kind == to and (to != "wn" or layer.dialect == dialect):
        return Step(layer, COPIED, f"already {to}")
    # Going back to plain weights takes every layer: the default list is about what to reparameterize.
    if (to != "sp" or selection.include or selection.exclude) and (reason := selection.reason_against(layer)):
        return Step(layer, SKIPPED, reason)
    if dialect == "clip-gmp" and len(layer.spec.shape) != 2:
        return Step(
            layer, SKIPPED, f"clip-gmp names matrices only, this weight has {len(layer.spec.shape)} axes"
        )
    wide = layer.spec.dtype == "F64"
    spec = replace(layer.spec, stored=stored or ("F64" if wide else "F32"), theta_origin="equator")
    bias = None if layer.bias is None else ("lambda_" if to == "gmp" else "bias")
    if layer.kind == to and _norms_by_row(layer, checkpoint):
        return Step(layer, CONVERTED, f"{layer.dialect} names become {dialect}", dialect)
    reason = "default selection" if not selection.include else "--include"
    return Step(layer, CONVERTED, reason, dialect, LayerRecord(to, spec, bias))


def _norms_by_row(layer: Layer, checkpoint: Checkpoint) -> bool:
    """Whether g has one norm a row of the first axis, which every dialect of weight normalization can name."""
    g = checkpoint.tensors[layer.tensors["weight_g"]].shape
    return bool(g) and g[0] == layer.spec.shape[0] and all(extent == 1 for extent in g[1:])


def settle_ties(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Tied layers convert together or not at all: one of them alone would be untied."""
    status = {step.layer.key: step.status for step in steps}
    partners: dict[str, list[str]] = {}
    for step in steps:
        if step.layer.tied_to is not None:
            partners.setdefault(step.layer.key, []).append(step.layer.tied_to)
            partners.setdefault(step.layer.tied_to, []).append(step.layer.key)
    settled = []
    for step in steps:
        apart = [key for key in partners.get(step.layer.key, ()) if status[key] != CONVERTED]
        if step.status == CONVERTED and apart:
            step = step.skip(f"its weight is tied to '{apart[0]}', which is not converted: --include both")
        settled.append(step)
    # Skipping one can leave another alone.
    return tuple(settled) if settled == list(steps) else settle_ties(settled)


def _why_nothing(steps: Sequence[Step]) -> str:
    if not steps:
        return "no tensor in it is the weight of a layer"
    reasons: dict[str, int] = {}
    for step in steps:
        reasons[step.reason] = reasons.get(step.reason, 0) + 1
    reason, count = max(reasons.items(), key=lambda item: item[1])
    return f"{count} of {len(steps)} layers: {reason}"
