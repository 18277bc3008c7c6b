"""Whether one model is another: a file against a file, or modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.errors import DataError, ReparamError
from reparam.pipeline.loading import load_network
from reparam.pipeline.runs import arch_args_of, checkpoint_of, input_of, run_of

if TYPE_CHECKING:
    from torch import nn

    from reparam.graph import InputSpec
    from reparam.verification import Report, Tolerance


def verify(
    reference: Path | str | nn.Module,
    candidate: Path | str | nn.Module,
    specs: Sequence[InputSpec | str] = (),
    *,
    arch: str | None = None,
    arch_args: Mapping[str, str] | None = None,
    data: Path | str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    tolerances: Mapping[str, Tolerance] | None = None,
    axes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Report:
    """Whether ``candidate`` computes what ``reference`` computes.

    | reference | candidate | compared |
    |---|---|---|
    | checkpoint and ``arch``, or module | ONNX file | three proofs: weights, algebra, deployment |
    | checkpoint | checkpoint | tensors, across parameterizations; no network is needed |
    | checkpoint | checkpoint, with ``arch`` and ``specs`` | outputs in float64, to what rounding of their values explains |
    | module | module | outputs in float64 |

    Args:
        reference: the untouched original; the folder of a run stands for its best checkpoint.
        candidate: what is to be proven; a run's folder likewise.
        specs: inputs, as :class:`InputSpec` or as ``--input`` has them; those of a run without. Not for two checkpoints
            without a network.
        arch, arch_args: the network of a checkpoint, as :func:`reparam.graph.load_architecture` takes them; None for a
            Hugging Face folder.
        data: file of real inputs (safetensors, PyTorch, npz, npy).
        rtol, atol: |d − y| ≤ atol + rtol·|y| instead of the tolerance derived from rounding errors.
        tolerances: the same by name of the output.
        axes: unit axes by glob, for two checkpoints.
        seed: of the inputs.

    Returns:
        A report; it does not raise where a check fails.

    Raises:
        ReparamError: bad input, also ``specs`` that the original itself does not take.
    """
    from reparam.checkpoint import open_checkpoint
    from reparam.graph import parse_spec
    from reparam.verification import Tolerance, load_data, verify_checkpoints, verify_models, verify_onnx

    reference, candidate = _path(reference), _path(candidate)
    if axes and not (arch is None and isinstance(candidate, Path) and candidate.suffix != ".onnx"):
        raise ReparamError("--axis: for tensors alone; the network tells which axis its units are on")
    given = [parse_spec(spec) if isinstance(spec, str) else spec for spec in specs]
    of_run = next((path for path in (reference, candidate) if isinstance(path, Path) and run_of(path)), None)
    if of_run is not None:
        arch_args = arch_args_of(of_run, arch, arch_args)
    if isinstance(reference, Path) and reference.suffix == ".onnx":
        raise ReparamError(f"{reference}: the reference is a checkpoint, the ONNX file comes second")
    if isinstance(candidate, Path) and candidate.suffix != ".onnx":
        if not isinstance(reference, Path):
            raise ReparamError(f"{candidate}: a module is compared with an ONNX file or a module")
        if arch is None:
            if given or data is not None:
                raise ReparamError("--input: two checkpoints are compared by their tensors without --arch")
            for path in (reference, candidate):
                for key, record in open_checkpoint(path).records.items():
                    if record.rewritten is not None:
                        raise ReparamError(
                            f"{path}: '{key}': {record.rewritten}: its tensors alone do not say what it computes: give "
                            "the network with --arch, and --input"
                        )
            return verify_checkpoints(reference, candidate, axes)
        candidate = load_network(candidate, arch, arch_args, as_held=True).model
    if not given and of_run is not None:
        given = [parse_spec(text) for text in input_of(of_run)]
    if not given:
        raise ReparamError("--input is missing: what the network takes, such as --input N,3,224,224")
    pair = isinstance(reference, Path) and not isinstance(candidate, Path)
    model = (
        reference
        if not isinstance(reference, Path)
        else load_network(reference, arch, arch_args, as_held=pair).model
    )
    real = load_data(Path(data), given) if data is not None else []
    if not isinstance(candidate, Path):
        report = verify_models(model, candidate, given, seed, data=real, rounded=pair)
    elif not candidate.exists():
        raise ReparamError(f"{candidate}: no such file")
    else:
        asked = None if rtol is None and atol is None else Tolerance(rtol or 0.0, atol or 0.0)
        report = verify_onnx(
            model, None, candidate, given, data=real, seed=seed, tolerance=asked, tolerances=tolerances
        )
        if report.by_rounding and isinstance(reference, Path):
            report = replace(report, notes=(*report.notes, *_made_of_another(reference, candidate)))
    if not report.passed and not real:
        _require_taken(model, given)
    return report


def _made_of_another(reference: Path, file: Path) -> tuple[str, ...]:
    """A line, where an ONNX file says that it was exported from another checkpoint than this."""
    from reparam.checkpoint import open_checkpoint
    from reparam.onnxfile.metadata import PARAMETERIZATION, SOURCE, properties, provenance
    from reparam.onnxfile.reading import read_graph

    said = properties(read_graph(file))
    if not {SOURCE, PARAMETERIZATION} <= said.keys():
        return ()
    if provenance(open_checkpoint(reference).files, ())[SOURCE] == said[SOURCE]:
        return ()
    kind = "+".join(kind for kind in said[PARAMETERIZATION].split("+") if kind != "sp") or "sp"
    return (
        f"weights differ by rounding alone: the file was exported from {'an' if kind == 'sp' else 'a'} {kind} "
        "checkpoint; verify against that one",
    )


def _require_taken(model: nn.Module, specs: Sequence[InputSpec]) -> None:
    """Raise DataError where the original itself takes no input of these, at whatever size: then nothing was compared."""
    from reparam.verification.samples import samples

    refused = []
    for found in samples(model, specs, 0):
        if not isinstance(found, str):
            return
        refused.append(found)
    asked = " ".join(f"{spec.name}={spec.dtype}[{','.join(map(str, spec.axes))}]" for spec in specs)
    raise DataError(f"--input {asked}: {refused[0].removesuffix(')').replace(': left out (', ': ', 1)}")


def _path(value: Path | str | nn.Module) -> Path | nn.Module:
    return checkpoint_of(Path(value)) if isinstance(value, (str, Path)) else value
