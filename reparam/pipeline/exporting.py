"""A checkpoint as an ONNX file: exported by torch, or refitted into a graph that is there.

| given | the graph comes from |
|---|---|
| `arch`, or a Hugging Face folder and its inputs | torch's export of the folded network |
| `template` | that file |
| a run's folder, or a checkpoint in it | the run's skeleton |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.checkpoint import open_checkpoint
from reparam.checkpoint.staging import refuse_existing, staged
from reparam.errors import CheckFailedError, ReparamError
from reparam.pipeline.loading import describes_network, load_network, require_description
from reparam.pipeline.proven import OnnxExport, accept, with_proof_of
from reparam.pipeline.runs import arch_args_of, checkpoint_of, input_of, notes_of, properties_of, run_of

# Stages are imported where they run: commands that read headers must not wait for torch.
if TYPE_CHECKING:
    from torch import nn

    from reparam.graph import InputSpec
    from reparam.verification import Report


def export_onnx(
    path: Path,
    arch: str | None,
    specs: Sequence[InputSpec],
    out: Path,
    *,
    arch_args: Mapping[str, str] | None = None,
    template: Path | None = None,
    template_weights: Path | None = None,
    opset: int | None = None,
    dtype: str | None = None,
    data: Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> OnnxExport:
    """Fold a checkpoint, export it to ONNX and prove that the file computes what the checkpoint computes.

    Three proofs, of :func:`reparam.verification.verify_onnx`: its weights are the folded ones bit for bit; folding
    changed nothing, in float64; ONNX Runtime computes what the *unfolded* model computes in float64. The file gets its
    name only if all hold; else it is left as ``NAME.failed.onnx``. Into a template without a network, fewer can be
    shown: see :func:`reparam.pipeline.refitting.refit_onnx`.

    Args:
        path: the checkpoint, or the folder of a run.
        arch, arch_args: its network, as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face
            folder, a template or a run.
        specs: the network's inputs; those a template declares where there are none.
        out: the ONNX file.
        template, template_weights: as :func:`~reparam.pipeline.refitting.refit_onnx` takes them.
        opset: version of ONNX's operator set, the exporter's default without.
        dtype: "fp16" or "bf16": what weights, inputs and outputs of the file are cast to.
        data: file of real inputs to compare on too (safetensors, PyTorch, npz, npy).
        seed: of the other inputs.
        force: replace ``out`` if it exists.

    Raises:
        ReparamError: bad input; nothing was written.
        VerificationError: the comparison failed; ``out`` was not touched.
        CheckFailedError: the model cannot be exported; nothing was written.
    """
    from reparam.export import export_onnx_model
    from reparam.graph import fold, parse_spec
    from reparam.onnxfile.external import data_of
    from reparam.onnxfile.metadata import provenance
    from reparam.verification import load_data, verify_onnx

    run, path = run_of(path), checkpoint_of(path)
    from_skeleton = (
        template is None
        and arch is None
        and run is not None
        and run.skeleton.is_file()
        and not (specs and describes_network(open_checkpoint(path)))
    )
    if run is not None and from_skeleton:
        template = run.skeleton
    if template is not None:
        from reparam.pipeline.refitting import refit_onnx

        if opset is not None or dtype is not None:
            option = "--dtype" if opset is None else "--opset"
            raise ReparamError(
                f"{option}: the graph of {template} stays as it is: leave it out, or give --arch alone"
            )
        refitted = refit_onnx(
            path, template, out, old=template_weights, arch=arch, arch_args=arch_args, specs=specs, data=data,
            seed=seed, force=force,
        )  # fmt: skip
        return with_proof_of(template, refitted) if from_skeleton else refitted
    if template_weights is not None:
        raise ReparamError("--template-weights: says what --template was exported from: give that too")
    if arch is None:
        require_description(open_checkpoint(path), "--template base.onnx")
    specs = specs or [parse_spec(text) for text in input_of(path)]
    if not specs:
        raise ReparamError("--input is missing: what the network takes, such as --input N,3,224,224")
    refuse_existing(out, force)
    real = [] if data is None else load_data(data, specs)
    network = load_network(path, arch, arch_args_of(path, arch, arch_args))
    model = network.model.eval()
    with data_of(out), staged(out, force) as temporary:
        folded = fold(model)
        checkpoint = network.checkpoint
        origin = provenance(checkpoint.files, (record.kind for record in checkpoint.records.values()))
        origin |= properties_of(path)
        done = export_onnx_model(folded, specs, temporary, opset, dtype, metadata=origin, target=out)
        report = verify_onnx(model, folded, temporary, done.specs, done.found.weights, real, seed=seed)
        accept(report, temporary, out)
    nbytes = out.stat().st_size + (0 if done.data is None else done.data.stat().st_size)
    return OnnxExport(out, nbytes, report, (*network.notes, *notes_of(path)))


def export_skeleton(
    model: nn.Module, specs: Sequence[InputSpec], path: Path, *, force: bool = False
) -> Report:
    """Export the graph into which a run's checkpoints can be refitted without their network; prove it once.

    Which initializer holds which weight is told by values, and at the start of a run many are equal: biases of zeros,
    batch norms of ones. So the graph is exported with values that are all different, which no simplification of the
    exporter depends on either, and the model's own are put in.

    Args:
        model: as it is to be trained, its layers reparameterized; in any mode, on any device. Not changed.
        specs: its inputs.
        path: the ONNX file.
        force: replace ``path`` if it exists.

    Returns:
        The three proofs.

    Raises:
        VerificationError: the file does not compute what the model computes; ``path`` was not touched.
        CheckFailedError: the model cannot be exported, or its graph could not be refitted; nothing was written.
        OutputError: ``path`` exists, or cannot be written.
    """
    import copy
    import tempfile

    from reparam.export import export_onnx_model
    from reparam.export.second import distinct
    from reparam.graph import fold
    from reparam.onnxfile.external import data_of
    from reparam.onnxfile.refit import refit
    from reparam.verification import verify_onnx

    refuse_existing(path, force)
    model = copy.deepcopy(model).cpu().eval()
    folded = fold(model)
    with tempfile.TemporaryDirectory(prefix="reparam-skeleton-", dir=path.parent) as folder:
        base = Path(folder) / "base.onnx"
        done = export_onnx_model(distinct(folded), specs, base)
        lost = [key for key in done.found.uncovered if folded.state_dict()[key].is_floating_point()]
        lost = [key for key in lost if key not in done.unused] + [
            k for ks in done.found.ambiguous.values() for k in ks
        ]
        if lost:
            raise CheckFailedError(
                f"{path}: not written: in the exported graph `{lost[0]}` is not found as a value of its own, so that no "
                "checkpoint of the run could be put in: they are exported with --arch"
            )
        with data_of(path), staged(path, force) as temporary:
            refit(base, folded.state_dict(), temporary, target=path)
            report = verify_onnx(model, folded, temporary, done.specs, done.found.weights)
            accept(report, temporary, path)
    return report
