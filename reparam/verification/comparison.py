"""One file on one provider against the original: errors of every output, by the rule that its own errors give.

The original's own rounding error at the deployed dtype, on the same inputs, says how far the file may be off
(:mod:`~reparam.verification.pools`), and where the file is further off, that error at inputs next to them
(:mod:`~reparam.verification.own_error`); its logits are held to it too where it gives probabilities. What no rounding
explains is a failure of its own: NaN and Inf, another shape, type, name or number of outputs, an axis that is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from reparam.graph.inputs import InputSpec
from reparam.verification.exact import Float64, Run, run
from reparam.verification.logits import logits_of
from reparam.verification.own_error import Judged, at_dtype, measure_again
from reparam.verification.pools import MAX_FACTOR, Pool, Tolerance
from reparam.verification.report import Check
from reparam.verification.runtime import CPU, RuntimeFailed, Session, line, open_session
from reparam.verification.samples import Sample
from reparam.verification.structure import value_fault

#: so many values of every output at one loudness need no spare sample of it
_ENOUGH = 1000


@dataclass(frozen=True)
class Deployed:
    """The file on one provider.

    Attributes:
        session: as it is.
        behind: by name of an output the value in the file that it is the softmax or sigmoid of.
        logits: the file with these values for outputs; None where there are none.
    """

    session: Session
    behind: Mapping[str, str]
    logits: Session | None


def deploy(
    model: onnx.ModelProto, path: Path, tolerances: Mapping[str, Tolerance | None], provider: str = CPU
) -> Deployed:
    """Load the file. Where the user says how near an output is to be, its logits are left out.

    Raises:
        RuntimeFailed: it does not load.
    """
    session = open_session(model, path, provider=provider)
    behind = {name: inner for name, inner in logits_of(model).items() if tolerances[name] is None}
    # A session of its own: with more outputs a runtime may fuse other nodes than in the file that is deployed.
    names = list(dict.fromkeys(behind.values()))
    return Deployed(session, behind, open_session(model, path, names, provider) if names else None)


class Comparison:
    """The original at two precisions, and what they say about a session."""

    def __init__(
        self,
        reference: nn.Module,
        specs: Sequence[InputSpec],
        dtype: torch.dtype,
        tolerances: Mapping[str, Tolerance | None],
        exact: nn.Module,
    ) -> None:
        self.specs, self.tolerances = specs, tolerances
        self.exact, self.own = exact, at_dtype(reference, dtype)
        self.dtype = dtype
        self.notes: list[str] = []

    def judge(self, deployed: Deployed, inputs: Iterable[Sample | str]) -> list[Check]:
        """Checks of all outputs, or the one that ended it."""
        pools = [Pool(name, self.tolerances[name]) for name in deployed.session.outputs]
        logits: dict[str, Pool] = {}
        judged: list[Judged] = []
        for found in inputs:
            sample: Sample | str | None = found
            if isinstance(sample, Sample) and sample.spare:
                if all(pool.values[sample.group] >= _ENOUGH for pool in pools):
                    continue
                sample = sample.tried(self.exact)
            while isinstance(sample, Sample):
                run_once = self._add(deployed, sample, pools, logits)
                if isinstance(run_once, Check):
                    return [run_once]
                judged.append(run_once)
                quieter = None if _compared(sample, pools) else sample.quietest()
                sample = None if quieter is None else quieter.tried(self.exact)
            if sample is not None:
                self._note(sample)
        if not judged:
            return [
                Check("reference", False, where="the original takes none of the inputs --input describes")
            ]
        for axis in dict.fromkeys(axis for spec in self.specs for axis in spec.dynamic):
            taken = {one.sample.sizes[axis] for one in judged}
            for pool in pools:
                if len(pool.sizes[axis]) == 1:  # at none: the pool says so
                    told = self._fixed(axis, min(pool.sizes[axis]), None if len(taken) == 1 else pool.name)
                    return [Check("dynamic axes", False, where=told)]
        every = (*pools, *logits.values())
        doubted = {pool for pool in every if pool.doubted}
        measure_again(self.own, self.exact, self.dtype, deployed.session.inputs, judged, doubted)
        return [check for pool in every for check in pool.checks()]

    def _add(
        self, deployed: Deployed, sample: Sample, pools: list[Pool], logits: dict[str, Pool]
    ) -> Check | Judged:
        """Run all three on one input and pool the errors; or what no rounding explains."""
        session = deployed.session
        taken, judged = sample.cast(session.inputs), Judged(sample)
        given, y = taken.inputs, taken.run_exactly(self.exact)
        try:
            f = run(self.own, given)
        except (RuntimeError, NotImplementedError) as error:
            told = f"the original does not run in {self.dtype}: {line(error)}"
            return Check("reference", False, where=told)
        if isinstance(y.recorder, Float64) and y.recorder.widened:
            self._note("the original asks for a narrower type in its forward pass: taken as float64")
        try:
            got = session.run(given)
        except RuntimeFailed as error:  # a baked-in axis may end here
            return Check("runs in ONNX Runtime", False, where=f"{sample}: {error}")
        if len(got) != len(y.outputs):
            text = f"the file has {len(got)} outputs, the original {len(y.outputs)}"
            return Check("outputs", False, where=text)
        if set(session.outputs) & set(y.names) and any(
            known not in (None, name) for known, name in zip(y.names, session.outputs, strict=True)
        ):
            text = f"the file gives {session.outputs}, the original {[name or '…' for name in y.names]}"
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
            if pool.floating and not bool(torch.isfinite(tensors[1]).all()):
                self._note(f"the original itself overflows {self.dtype} on {sample}: left out")
                continue
            if pool.floating:
                pool.add(sample.group, str(sample), *tensors)
                judged.outputs[i] = pool
            pool.count(sample.group, sample.sizes, y.outputs[i].numel())
        return self._add_logits(deployed, given, judged, y, f, logits) or judged

    def _add_logits(
        self,
        deployed: Deployed,
        given: Sequence[Tensor],
        judged: Judged,
        y: Run,
        f: Run,
        pools: dict[str, Pool],
    ) -> Check | None:
        """The same for what outputs are the softmax or sigmoid of, where both the file and the original have it."""
        if deployed.logits is None or all(y.logits(i) is None for i in range(len(y.outputs))):
            return None
        sample = judged.sample
        try:
            values = dict(zip(deployed.logits.outputs, deployed.logits.run(given), strict=True))
        except RuntimeFailed as error:
            return Check("runs in ONNX Runtime", False, where=f"{sample}: {error}")
        for i, name in enumerate(deployed.session.outputs):
            exact, own = y.logits(i), f.logits(i)
            got = values.get(deployed.behind.get(name, ""))
            # A softmax over another layout has others; a mask's −∞ has no error.
            if exact is None or own is None or got is None or got.shape != exact.shape:
                continue
            if not bool(torch.isfinite(exact).all() and torch.isfinite(own).all()):
                continue
            told = f"{name} (its logits)"
            if not bool(torch.isfinite(got).all()):
                return Check("finite", False, where=f"output {told}, {sample}: the file gives NaN or Inf")
            judged.logits[i] = pools.setdefault(name, Pool(told))
            judged.logits[i].add(sample.group, str(sample), exact, own, got)
        return None

    def _fixed(self, axis: str, only: int, output: str | None) -> str:
        """What to do about an axis of which one extent was compared, where others were tried for ``output``."""
        if output is None:
            return f"the original takes {axis}={only} alone: write {only} instead of {axis} in --input"
        told = f"output {output} was compared at {axis}={only} alone, the original overflows {self.dtype} at others"
        return f"{told}: give real inputs of other sizes with --data"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _compared(sample: Sample, pools: Iterable[Pool]) -> bool:
    """Whether every output was compared at every extent that an input has."""
    return all(extent in pool.sizes[axis] for pool in pools for axis, extent in sample.sizes.items())


def _decided(y: Run, f: Run, got: Tensor, index: int, pool: Pool) -> Check | None:
    """Integers and truth values may differ where the numbers they were decided by are within their error of a tie."""
    want = y.outputs[index]
    wrong = got != want
    if not bool(wrong.any()):
        return None
    told = f"{int(wrong.sum())} of {want.numel()} values differ"
    decision = y.decision(index)
    if decision is None:
        return Check("equal", False, where=told)
    error = decision.error(f.decision(index))
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
