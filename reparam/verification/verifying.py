"""The three proofs of one ONNX file, one after the other, and where a file that fails first departs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from torch import Tensor, nn

from reparam.errors import CheckpointError
from reparam.graph.folding import fold
from reparam.graph.inputs import InputSpec
from reparam.layers import Reparameterized
from reparam.onnxfile import weight_map as maps
from reparam.onnxfile.mapping import find_map
from reparam.onnxfile.reading import read_graph, read_initializers
from reparam.onnxfile.weight_map import WeightMap
from reparam.verification.algebra import check_graph, compare_runs
from reparam.verification.deployment import compare_onnx
from reparam.verification.exact import Float64, in_float64, now_in_float64, reference_copy, run
from reparam.verification.locating import locate
from reparam.verification.pools import Tolerance
from reparam.verification.report import Check, Report
from reparam.verification.rounding import perturbed
from reparam.verification.runtime import deployed_dtype
from reparam.verification.samples import Sample, samples
from reparam.verification.weights import check_weights, used_keys

#: Algebra is exact on any input, so few small ones do: where batches are dynamic, one of 1 and one of 2.
_ALGEBRA_SAMPLES = 2


def verify_onnx(
    reference: nn.Module,
    folded: nn.Module | None,
    path: Path,
    specs: Sequence[InputSpec],
    weight_map: WeightMap | None = None,
    data: Sequence[tuple[Tensor, ...]] = (),
    *,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    tolerance: Tolerance | None = None,
    tolerances: Mapping[str, Tolerance] | None = None,
) -> Report:
    """Prove that an ONNX file computes what ``reference`` computes.

    Args:
        reference: the untouched original, in any parameterization.
        folded: the plain model the file was made from; None: ``reference`` is folded.
        path: the file.
        specs: its inputs, in the order ``reference`` takes them.
        weight_map: where its initializers come from; None: what its metadata says, or what equal values tell.
        data: real inputs, as :func:`~reparam.verification.samples.load_data` reads them.
        seed, outputs, tolerance, tolerances: as :func:`~reparam.verification.deployment.compare_onnx` takes them.

    Returns:
        A report; what is wrong with the file is a failed check, not an exception.
    """
    try:
        model = read_graph(path)
    except CheckpointError as error:
        return Report((Check("loads in ONNX Runtime", False, where=str(error)),))
    plain = folded if folded is not None else fold(reference_copy(reference))
    dtype = deployed_dtype(model)
    if any(x.is_floating_point() and x.dtype != dtype for x in (*plain.parameters(), *plain.buffers())):
        plain = copy.deepcopy(plain).to(dtype)
    found = weight_map or _map(model, path, plain)
    exact = in_float64(reference)
    inputs = list(samples(exact, specs, seed, data, spare=True))
    first = [s for s in inputs if isinstance(s, Sample) and not s.spare]
    few = first[:_ALGEBRA_SAMPLES]

    algebra, notes, used = _algebra(exact, path, model, found, few)
    state = plain.state_dict()
    constants = {name: x for name, x in plain.named_buffers() if name not in state}
    weights = check_weights(path, model, found, state, used, constants)
    deployed = compare_onnx(
        reference, path, specs, outputs=outputs, tolerance=tolerance, tolerances=tolerances, exact=exact, inputs=inputs
    )  # fmt: skip
    report = Report(
        (*weights.checks, *algebra, *deployed.checks),
        (*weights.notes, *notes, *deployed.notes),
        weights.key,
        by_rounding=weights.by_rounding,
    )
    if report.passed or report.diverges or not few:
        return report
    return replace(report, diverges=locate(reference_copy(plain), path, model, found, few[-1]))


def verify_models(
    reference: nn.Module,
    candidate: nn.Module,
    specs: Sequence[InputSpec],
    seed: int = 0,
    data: Sequence[tuple[Tensor, ...]] = (),
    *,
    rounded: bool = False,
) -> Report:
    """Whether two modules compute the same in evaluation mode: both in float64, to 1e-12 of the outputs' scale.

    Args:
        reference, candidate: in any parameterization; take the same inputs positionally.
        specs: their inputs.
        seed: of the inputs.
        data: real inputs.
        rounded: whether one was made of the other and its values rounded to their dtypes, as files hold them: then
            each output is held to what :mod:`reparam.verification.rounding` explains of it.
    """
    exact, other = in_float64(reference), in_float64(candidate)
    found = list(samples(exact, specs, seed, data))
    notes = tuple(note for note in found if isinstance(note, str))
    inputs = [sample for sample in found if isinstance(sample, Sample)]
    wanted = (sample.run_exactly(exact) for sample in inputs)
    got = (run(other, sample.inputs, Float64()) for sample in inputs)
    near = None
    if rounded:
        moved = perturbed(reference, candidate)
        near = (run(moved, sample.inputs, Float64()) for sample in inputs)
    return Report((compare_runs(wanted, got, inputs, "models", near),), notes)


def _algebra(
    exact: nn.Module,
    path: Path,
    model: onnx.ModelProto,
    weight_map: WeightMap,
    few: Sequence[Sample],
) -> tuple[tuple[Check, ...], tuple[str, ...], set[str]]:
    """Checks, notes, and the keys that the folded model computes with."""
    checks: tuple[Check, ...] = ()
    folded = now_in_float64(fold(exact))
    smallest = few[:1]
    runs = [run(folded, sample.inputs, Float64()) for sample in smallest]
    if any(isinstance(module, Reparameterized) for module in exact.modules()):
        wanted = [sample.run_exactly(exact) for sample in smallest]
        checks = (compare_runs(wanted, runs, smallest, "folded model"),)
    originals = [sample.run_exactly(exact) for sample in few]
    graph, notes = check_graph(folded, path, model, weight_map, few, originals)
    return (*checks, *graph), notes, used_keys(folded, runs[0]) if runs else set()


def _map(model: onnx.ModelProto, path: Path, plain: nn.Module) -> WeightMap:
    """What the file's metadata says of its initializers; where it says nothing that can be read, what values tell."""
    state = plain.state_dict()
    for entry in model.metadata_props:
        if entry.key == maps.KEY:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                known = WeightMap.load(entry.value)
                # A file made after batch norms were folded knows keys that this model lacks.
                if all(key in state for source in known.sources.values() for key in source.keys):
                    return known
    eps = {name: m.eps for name, m in plain.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return find_map(read_initializers(path, model), plain.state_dict(), eps).weights
