"""Fine-tuning a checkpoint, and exporting one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.checkpoint.staging import refuse_existing, staged
from reparam.errors import OutputError, ReparamError
from reparam.pipeline.loading import load_network

# Stages are imported where they run: commands that read headers must not wait for torch.
if TYPE_CHECKING:
    from reparam.graph import InputSpec
    from reparam.training import FinetuneResult, Recipe
    from reparam.verification import Report


@dataclass(frozen=True)
class FinetuneRun:
    """The checkpoint a fine-tuning wrote, its size, how it went, and what was noted on reading its source."""

    output: Path
    nbytes: int
    result: FinetuneResult
    recipe: Recipe
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnnxExport:
    """The ONNX file an export wrote, its size, the verification it passed, and what was noted on reading its source."""

    output: Path
    nbytes: int
    report: Report
    notes: tuple[str, ...] = ()


def finetune(
    path: Path,
    arch: str | None,
    data: Path,
    out: Path,
    recipe: Recipe | None = None,
    *,
    arch_args: Mapping[str, str] | None = None,
    mean: float | None = None,
    std: float | None = None,
    force: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> FinetuneRun:
    """Fine-tune a checkpoint in the parameterization it is held in.

    Args:
        path: the checkpoint.
        arch, arch_args: its network, as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face
            folder.
        data: folder of IDX files; ``mean`` and ``std`` as :func:`reparam.training.load_dataset` takes them.
        out: folder for ``model.safetensors``, held as the input is, and ``metrics.jsonl``; made if missing.
        recipe: how to train.
        force: replace what an earlier run left in ``out``.
        on_step: called after every step with its number and loss.

    Raises:
        ReparamError: bad input; nothing was written.
        CheckFailedError: training diverged; nothing was written.
    """
    from reparam.checkpoint import save_state_dict
    from reparam.graph import records_of
    from reparam.training import Recipe, load_dataset
    from reparam.training import finetune as train

    recipe = recipe or Recipe()
    target, metrics = out / "model.safetensors", out / "metrics.jsonl"
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder: name another place with -o")
    if target.exists() and not force:
        raise OutputError(f"{target}: exists: --force overwrites it, -o names another place")
    network = load_network(path, arch, arch_args)
    dataset = load_dataset(data, mean, std)
    result = train(network.model, dataset, recipe, on_step)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror})") from error
    # In the dtypes the file had, whatever the architecture computes in.
    save_state_dict(network.state_dict(), records_of(network.model), target, force=force)
    with staged(metrics, force=True) as temporary:
        temporary.write_text(_metrics(result, recipe), encoding="utf-8")
    return FinetuneRun(target, target.stat().st_size, result, recipe, network.notes)


def export_onnx(
    path: Path,
    arch: str | None,
    specs: Sequence[InputSpec],
    out: Path,
    *,
    arch_args: Mapping[str, str] | None = None,
    opset: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    force: bool = False,
) -> OnnxExport:
    """Fold a checkpoint, export it to ONNX and prove that the file computes what the checkpoint computes.

    Three proofs, of :func:`reparam.verification.verify_onnx`: its weights are the folded ones bit for bit; folding
    changed nothing, in float64; ONNX Runtime computes what the *unfolded* model computes in float64. The file gets its
    name only if all hold; else it is left as ``NAME.failed.onnx``.

    Args:
        path: the checkpoint.
        arch, arch_args: its network, as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face
            folder.
        specs: the network's inputs.
        out: the ONNX file.
        opset: version of ONNX's operator set, the exporter's default without.
        dtype: "fp16" or "bf16": what weights, inputs and outputs of the file are cast to.
        seed: of the inputs of the comparison.
        force: replace ``out`` if it exists.

    Raises:
        ReparamError: bad input; nothing was written.
        VerificationError: the comparison failed; ``out`` was not touched.
        CheckFailedError: the model cannot be exported; nothing was written.
    """
    from reparam.export import export_onnx_model
    from reparam.graph import fold
    from reparam.onnxfile.metadata import VERIFICATION, annotate, provenance
    from reparam.verification import VerificationError, verify_onnx

    if not specs:
        raise ReparamError("--input is missing: what the network takes, such as --input N,3,224,224")
    refuse_existing(out, force)
    network = load_network(path, arch, arch_args)
    model = network.model.eval()
    with staged(out, force) as temporary:
        folded = fold(model)
        checkpoint = network.checkpoint
        origin = provenance(checkpoint.files, (record.kind for record in checkpoint.records.values()))
        done = export_onnx_model(folded, specs, temporary, opset, dtype, metadata=origin, target=out)
        try:
            report = verify_onnx(model, folded, temporary, done.specs, done.found.weights, seed=seed)
        except BaseException:
            if done.data is not None:
                done.data.unlink()
            raise
        if report.passed:
            annotate(temporary, {VERIFICATION: json.dumps(report.to_json()["proofs"])})
        else:
            failed = out.with_suffix(".failed.onnx")
            temporary.replace(failed)
            found = "; ".join(str(check).removeprefix("FAIL ") for check in report.failures)
            raise VerificationError(
                f"{out}: not written, the exported file differs ({failed.name}): {found}", report
            )
    return OnnxExport(out, out.stat().st_size, report, network.notes)


def _metrics(result: FinetuneResult, recipe: Recipe) -> str:
    """JSON lines: the recipe, every step, the accuracies."""
    lines: list[dict[str, object]] = [{"recipe": asdict(recipe)}]
    lines += [{"step": step, "loss": loss} for step, loss in enumerate(result.losses, 1)]
    lines.append({"accuracy_before": result.accuracy_before, "accuracy_after": result.accuracy_after})
    return "".join(json.dumps(line) + "\n" for line in lines)
