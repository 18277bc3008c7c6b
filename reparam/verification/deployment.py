"""Deployment: the file in ONNX Runtime against the untouched original in float64, over many inputs.

The original's own rounding error at the deployed dtype, on the same inputs, says how far the file may be off
(:mod:`~reparam.verification.pools`). What no rounding explains is a failure of its own: NaN and Inf, another shape, type,
name or number of outputs, an axis that is fixed, training mode, an operator that does not run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from reparam.errors import CheckpointError
from reparam.graph.inputs import InputSpec
from reparam.onnxfile.reading import read_graph
from reparam.verification.exact import Float64, Run, in_float64, run
from reparam.verification.pools import FLOOR, MAX_FACTOR, Pool, Tolerance
from reparam.verification.report import Check, Report
from reparam.verification.runtime import (
    CUDA,
    RuntimeFailed,
    Session,
    cuda_obstacle,
    deployed_dtype,
    line,
    open_session,
)
from reparam.verification.samples import Sample, samples
from reparam.verification.structure import check_structure, value_fault


def compare_onnx(
    reference: nn.Module,
    path: Path,
    specs: Sequence[InputSpec],
    seed: int = 0,
    *,
    outputs: Sequence[str] | None = None,
    data: Sequence[tuple[Tensor, ...]] = (),
    tolerance: Tolerance | None = None,
    tolerances: Mapping[str, Tolerance] | None = None,
) -> Report:
    """Whether the ONNX file computes what ``reference`` computes: on ONNX Runtime's CPU provider, and on CUDA's where it
    runs.

    Args:
        reference: the untouched original; copies in evaluation mode run at the deployed dtype and in float64.
        path: the ONNX file.
        specs: its inputs, in the order ``reference`` takes them.
        seed: of the inputs.
        outputs: the names the file's outputs are to have, in order.
        data: real inputs, judged as a group of their own.
        tolerance: the user's own, instead of the derived one.
        tolerances: by name of the output, before ``tolerance``.

    Returns:
        A report; a file that cannot be loaded or run is a failed check, not an exception.
    """
    try:
        model = read_graph(path)
    except CheckpointError as error:
        return Report((Check("loads in ONNX Runtime", False, where=str(error)),))
    fault = check_structure(model, specs, outputs)
    if fault is not None:
        return Report((fault,))
    try:
        session = open_session(model, path)
    except RuntimeFailed as error:
        return Report((Check("loads in ONNX Runtime", False, where=str(error)),))
    allowed = {name: (tolerances or {}).get(name, tolerance) for name in session.outputs}
    unknown = [name for name in tolerances or {} if name not in allowed]
    if unknown:
        return Report(
            (Check("outputs", False, where=f"no output `{unknown[0]}`: there are {list(allowed)}"),)
        )
    notes = ["bfloat16 does not run on ONNX Runtime's CPU: computed in float32"] if session.widened else []
    comparison = _Comparison(reference, specs, deployed_dtype(model), allowed)
    checks = comparison.judge(session, samples(reference_copy(reference), specs, seed, data))
    report = Report(tuple(checks), (*notes, *comparison.notes))
    if not report.passed:
        return report
    return _on_cuda(report, comparison, model, path, samples(reference_copy(reference), specs, seed, data))


def reference_copy(reference: nn.Module) -> nn.Module:
    """A copy in evaluation mode."""
    return copy.deepcopy(reference).eval()


def _on_cuda(
    report: Report,
    comparison: _Comparison,
    model: onnx.ModelProto,
    path: Path,
    inputs: Iterable[Sample | str],
) -> Report:
    obstacle = cuda_obstacle()
    if obstacle is not None:
        return replace(report, notes=(*report.notes, f"CUDA: not run, {obstacle}"))
    try:
        session = open_session(model, path, provider=CUDA)
    except RuntimeFailed as error:
        return replace(report, notes=(*report.notes, f"CUDA: not run, {error}"))
    notes = list(comparison.notes)
    checks = [replace(check, name=f"CUDA: {check.name}") for check in comparison.judge(session, inputs)]
    comparison.notes = notes
    return replace(report, checks=(*report.checks, *checks))


class _Comparison:
    """The original at two precisions, and what they say about a session."""

    def __init__(
        self,
        reference: nn.Module,
        specs: Sequence[InputSpec],
        dtype: torch.dtype,
        tolerances: Mapping[str, Tolerance | None],
    ) -> None:
        self.specs, self.tolerances = specs, tolerances
        self.exact, self.own = in_float64(reference), reference_copy(reference)
        if _dtype(reference) != dtype:
            self.own = self.own.to(dtype)
        self.dtype = dtype
        self.notes: list[str] = []

    def judge(self, session: Session, inputs: Iterable[Sample | str]) -> list[Check]:
        """Checks of all outputs, or the one that ended it."""
        pools = [Pool(name, self.tolerances[name]) for name in session.outputs]
        used: list[Sample] = []
        for sample in inputs:
            if isinstance(sample, str):
                self._note(sample)
                continue
            fault = self._add(session, sample, pools)
            if fault is not None:
                return [fault]
            used.append(sample)
        if not used:
            return [
                Check("reference", False, where="the original takes none of the inputs --input describes")
            ]
        for axis in dict.fromkeys(axis for spec in self.specs for axis in spec.dynamic):
            seen = {sample.sizes[axis] for sample in used if axis in sample.sizes}
            if len(seen) < 2:
                told = f"the original takes {axis}={min(seen)} alone: write {min(seen)} instead of {axis} in --input"
                return [Check("dynamic axes", False, where=told)]
        return [check for pool in pools for check in pool.checks()]

    def _add(self, session: Session, sample: Sample, pools: list[Pool]) -> Check | None:
        given = tuple(
            x.to(kind) if kind is not None and x.is_floating_point() else x
            for x, kind in zip(sample.inputs, session.inputs, strict=True)
        )
        mode = Float64()
        y = run(self.exact, given, mode)
        try:
            f = run(self.own, given)
        except (RuntimeError, NotImplementedError) as error:
            told = f"the original does not run in {self.dtype}: {line(error)}"
            return Check("reference", False, where=told)
        if mode.widened:
            self._note("the original asks for a narrower type in its forward pass: taken as float64")
        try:
            got = session.run(given)
        except RuntimeFailed as error:  # a baked-in axis may end here
            return Check("runs in ONNX Runtime", False, where=f"{sample}: {error}")
        if len(got) != len(y.outputs):
            text = f"the file has {len(got)} outputs, the original {len(y.outputs)}"
            return Check("outputs", False, where=text)
        for i, pool in enumerate(pools):
            tensors = y.outputs[i], f.outputs[i], got[i]
            kind = session.types[i]
            fault = value_fault(*tensors, kind)
            if fault is None and not tensors[1].is_floating_point():
                pool.floating = False
                fault = _decided(y, f, got[i], i, pool)
            if fault is not None:
                return replace(fault, where=f"output {pool.name}, {sample}: {fault.where}{_order(y, got, i)}")
            if pool.floating and bool(torch.isfinite(tensors[1]).all()):
                pool.add(sample.group, str(sample), *tensors)
            elif pool.floating:
                self._note(f"the original itself overflows {self.dtype} on {sample}: left out")
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _dtype(model: nn.Module) -> torch.dtype:
    """The floating type most of a model's parameters and buffers have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def _decided(y: Run, f: Run, got: Tensor, index: int, pool: Pool) -> Check | None:
    """Integers and truth values may differ where the numbers they were decided by are within their error of a tie."""
    want = y.outputs[index]
    wrong = got != want
    if not bool(wrong.any()):
        return None
    told = f"{int(wrong.sum())} of {want.numel()} values differ"
    found = y.decision(index)
    if found is None:
        return Check("equal", False, where=told)
    at, decision = found
    error = FLOOR * float(decision.left.abs().max())
    if at < len(f.recorder.decisions):
        own = f.recorder.decisions[at].left
        if own.shape == decision.left.shape:
            error = max(error, float((own.double() - decision.left).abs().max()))
    margin = decision.margin(got)[wrong]
    if float(margin.max()) > MAX_FACTOR * error:
        return Check(
            "equal", False, float(margin.max()), where=f"{told}, by margins up to {float(margin.max()):.1e}"
        )
    pool.forgiven += int(wrong.sum())
    return None


def _order(y: Run, got: list[Tensor], index: int) -> str:
    """A hint where the file gives another output in this one's place."""
    for i, want in enumerate(y.outputs):
        same = i != index and want.shape == got[index].shape and want.is_floating_point()
        if same and bool(torch.allclose(got[index].double(), want, rtol=1e-3, atol=1e-5)):
            return f"; it looks like output {i} of the original: are the outputs in another order?"
    return ""
