"""Algebra: in float64 nothing is rounded that matters, so two programs of one function agree to 1e-12.

    fold(original)(x) = original(x)                 both in torch, float64
    graph(fold(original).weights)(x) = original(x)              the file's graph in float64, with float64 weights

The graph gets its weights through the map, not from the file, where they are rounded: so it is the graph alone that is
judged, and :mod:`~reparam.verification.weights` judges the values. Numbers in the code (a slope, an epsilon) stand in an
ONNX file as float32. Where it has such numbers it is held against the folded original, which is given them so rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from reparam.onnxfile import transforms
from reparam.onnxfile.reading import graphs
from reparam.onnxfile.weight_map import Source, WeightMap
from reparam.verification.exact import Float64, Run, run
from reparam.verification.operators import Evaluator
from reparam.verification.pools import MAX_FACTOR
from reparam.verification.report import Check
from reparam.verification.rounding import TOLERANCE, explained
from reparam.verification.runtime import line
from reparam.verification.samples import Sample
from reparam.verification.widening import FLOATS

#: operators whose own definition has a 1/6 or its like in float32
_THIRDS = ("HardSigmoid", "HardSwish", "Selu")
#: where the graph holds constants that float32 cannot hold exactly
CONSTANTS = 2.0**-22


def compare_runs(
    wanted: Iterable[Run],
    got: Iterable[Run],
    inputs: Iterable[Sample],
    name: str,
    near: Iterable[Run] | None = None,
) -> Check:
    """Two modules in float64, a run of each an input: the check ``name``.

    ``near`` are runs of the first one :func:`perturbed`: then each output is held to what rounding explains of it.
    """
    return _errors(wanted, (other.outputs for other in got), inputs, near).check(name, TOLERANCE)


def check_graph(
    folded: nn.Module,
    path: Path,
    model: onnx.ModelProto,
    weight_map: WeightMap,
    samples: Sequence[Sample],
    originals: Sequence[Run],
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """The file's graph against the original, both float64: checks, and what could not be checked.

    Args:
        folded: the plain original, with float64 weights.
        path, model: the file, external values not loaded.
        weight_map: where its initializers come from.
        samples: inputs.
        originals: what the original, in any parameterization, gives on them in float64.
    """
    state, sources = folded.state_dict(), weight_map.sources
    try:
        inexact = _inexact_constants(model, weight_map)
        if not inexact and not _rounds(model):
            graph = _evaluator(model, path, state, sources)
            error = _errors(originals, (graph.run(sample.inputs) for sample in samples), samples)
            if (check := error.check("graph", TOLERANCE)).passed:
                return (check,), error.notes()
        # Its operators may round numbers that they have by default.
        graph = _evaluator(model, path, state, {name: _rounded(source) for name, source in sources.items()})
        wanted = (run(folded, sample.inputs, Float64(round_scalars=True)) for sample in samples)
        error = _errors(wanted, (graph.run(sample.inputs) for sample in samples), samples)
    except Exception as problem:  # whatever an evaluator of another project raises
        return (), (
            f"algebra: the file's graph was not run in float64: {type(problem).__name__}: {line(problem)}",
        )
    if not inexact or error.notes():
        return (error.check("graph", TOLERANCE),), error.notes()
    note = (
        f"algebra: the graph holds constants in float32 ({', '.join(inexact[:4])}): judged at {CONSTANTS:.0e}"
    )
    return (error.check("graph", CONSTANTS),), (note,)


def _evaluator(
    model: onnx.ModelProto, path: Path, state: Mapping[str, Tensor], sources: Mapping[str, Source]
) -> Evaluator:
    return Evaluator(model, path, {name: transforms.apply(source, state) for name, source in sources.items()})


def _rounded(source: Source) -> Source:
    """A batch norm's ε as torch is given it here."""
    settings = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in source.settings.items()}
    return Source(source.keys, source.transform, settings)


def _errors(
    wanted: Iterable[Run],
    got: Iterable[Sequence[Tensor]],
    inputs: Iterable[Sample],
    near: Iterable[Run] | None = None,
) -> _Error:
    error = _Error()
    moved = None if near is None else iter(near)
    for one, other, sample in zip(wanted, got, inputs, strict=True):
        error.fault = error.add(other, one, sample, None if moved is None else next(moved))
        if error.fault is not None:
            break
    return error


class _Error:
    """The largest errors of every output, as shares of its scale.

    Attributes:
        fault: what no tolerance excuses, None if nothing.
        decided: how many integers and truth values are as they should be.
        worst: by output, its largest error as a share of its scale, the same in its own units, and where that is.
        noise: by output, how much of its scale rounding moves it, where that was given.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self.decided = 0
        self.worst: dict[int, tuple[float, float, str]] = {}
        self.noise: dict[int, float] = {}

    def add(self, got: Sequence[Tensor], want: Run, sample: Sample, near: Run | None) -> str | None:
        """What no tolerance excuses, None if nothing."""
        if len(got) != len(want.outputs):
            return f"{len(got)} outputs, should be {len(want.outputs)}"
        for i, (a, b) in enumerate(zip(got, want.outputs, strict=True)):
            where = f"output {i}, {sample}"
            if a.shape != b.shape:
                return f"{where}: {list(a.shape)}, should be {list(b.shape)}"
            if b.is_complex() or not b.numel():
                continue
            if not b.is_floating_point():
                if not _as_decided(a, want, i, near):
                    return f"{where}: {int((a != b).sum())} of {b.numel()} values differ"
                self.decided += b.numel()
                continue
            if a.dtype != torch.float64:
                return f"{where}: computed in {a.dtype}"
            if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
                return f"{where}: NaN or Inf"
            apart, relative = _apart(a, b)
            if i not in self.worst or relative >= self.worst[i][0]:
                self.worst[i] = relative, apart, where
            if near is not None and near.outputs[i].shape == b.shape:
                moved = _apart(near.outputs[i], b)[1]
                self.noise[i] = max(self.noise.get(i, 0.0), moved if np.isfinite(moved) else 0.0)
        return None

    def notes(self) -> tuple[str, ...]:
        if self.fault is not None or self.worst or not self.decided:
            return ()
        return ("algebra: no output is a floating number: integers and truth values were compared alone",)

    def check(self, name: str, tolerance: float) -> Check:
        if self.fault is not None:
            return Check(name, False, where=self.fault, proof="algebra")
        if not self.worst:
            compared = "integers and truth values alone" if self.decided else "nothing was compared"
            return Check(
                name, bool(self.decided), 0.0, 0.0, tolerance=tolerance, where=compared, proof="algebra"
            )
        bounds = {i: explained(self.noise.get(i, 0.0), tolerance) for i in self.worst}
        i = max(self.worst, key=lambda i: self.worst[i][0] / bounds[i])
        relative, largest, where = self.worst[i]
        shown = relative if np.isfinite(relative) else None
        if bounds[i] > tolerance:
            where += "; the tolerance is what rounding of the weights explains"
        return Check(
            name, relative <= bounds[i], largest, shown, tolerance=bounds[i], where=where, proof="algebra"
        )


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference, and it as a share of the largest of ``b``."""
    apart, scale = float((a - b).abs().max()), float(b.abs().max())
    return apart, apart / scale if scale else (0.0 if apart == 0 else float("inf"))


def _as_decided(got: Tensor, want: Run, index: int, near: Run | None) -> bool:
    """Whether integers or truth values are equal, but where the numbers they were decided by are all but a tie."""
    wrong = got != want.outputs[index]
    decision = want.decision(index)
    if decision is None or not bool(wrong.any()):
        return not bool(wrong.any())
    margin = decision.margin(got.to(decision.result.dtype))[wrong]
    moved = decision if near is None else near.decision(index)
    return float(margin.max()) <= MAX_FACTOR * decision.error(moved)


def _rounds(model: onnx.ModelProto) -> bool:
    """Whether a node is given a number that may have been rounded to float32."""
    return any(
        not _is_short(np.array([*attribute.floats, attribute.f]))
        for graph in graphs(model)
        for node in graph.node
        for attribute in node.attribute
    )


def _is_short(values: np.ndarray) -> bool:
    """Whether all are powers of two, small integers or their like, which float32 holds as they are."""
    mantissa = np.frexp(values.astype(np.float64))[0] * 2.0**12
    return np.array_equal(mantissa, np.round(mantissa))


def _inexact_constants(model: onnx.ModelProto, weight_map: WeightMap) -> list[str]:
    """Float constants that may have been rounded to float32."""
    found = []

    def look(name: str, tensor: TensorProto) -> None:
        inside = tensor.data_type in FLOATS and tensor.data_location != TensorProto.EXTERNAL
        if inside and not _is_short(onnx.numpy_helper.to_array(tensor)):
            found.append(name)

    for graph in graphs(model):
        for tensor in graph.initializer if isinstance(graph, onnx.GraphProto) else ():
            if tensor.name not in weight_map.sources:
                look(tensor.name, tensor)
        for node in graph.node:
            if node.op_type in _THIRDS:
                found.append(node.op_type)
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    look(node.output[0], attribute.t)
    return found
