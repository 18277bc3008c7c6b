"""Convert a checkpoint in its network: read → fold → rules → decode and compare → write."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reparam.checkpoint import folders, open_checkpoint, save_state_dict
from reparam.checkpoint.staging import refuse_existing, require_space, staged
from reparam.errors import OutputError, SelectionError
from reparam.pipeline.calibration import calibration_inputs
from reparam.pipeline.loading import load_network
from reparam.pipeline.report import ModelReport, describe_layers
from reparam.pipeline.runs import arch_args_of, checkpoint_of, input_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reparam.checkpoint import Checkpoint, LayerRecord
    from reparam.graph import Outcome

#: inputs of a batch of the calibration, and of the comparison of outputs
_BATCH, _COMPARED = 256, 16


def convert_model(
    path: Path | str,
    to: str,
    arch: str | None = None,
    *,
    arch_args: Mapping[str, str] | None = None,
    output: Path | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold_bn: bool = False,
    mean_norm: bool = False,
    calibrate: Path | None = None,
    scale: Literal["outside", "inside"] | None = None,
    inputs: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> ModelReport:
    """Write a checkpoint in another parameterization, its network known; the source is only read.

    The model is held in memory, in the file's dtypes; weights are computed in float64 and rounded once.

    Args:
        path: a checkpoint file, an index of shards, or a folder; that of a run stands for its best checkpoint.
        to: "sp", "wn", "gmp" or "unit".
        arch, arch_args: the network, as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face
            folder, whose config.json says it.
        output: file or folder to make; None for NAME.gmp.safetensors or NAME-gmp/ beside the input. A folder gets one
            model.safetensors, also where the source is sharded, and the other files of the source.
        include, exclude, fold_bn, mean_norm: as :func:`reparam.graph.convert` takes them.
        scale: of GmP, "outside" (None too) or "inside".
        calibrate: inputs that set the running means: a folder that fine-tuning takes for its data, or an array in .npz
            or .safetensors (FILE:NAME, one of several). The outputs of both networks are compared on the first of them.
        inputs: what the network takes, as ``--input`` has it: outputs are compared on such inputs, seeded; what a
            run's network takes, its folder says. Calibration inputs go before both.
        force: replace an existing output.
        dry_run: do everything but write.

    Returns:
        What became of every layer, what every rule did, and how exactly the layers convert back.

    Raises:
        ReparamError: bad input or options, or an output that cannot be written; nothing is left behind.
        CheckFailedError: the result would not give the source back, or computes something else; nothing is left behind.
    """
    from reparam.graph import records_of
    from reparam.graph.comparing import compare_layers
    from reparam.kernels.backend import for_conversion
    from reparam.parameterizations import parameterization
    from reparam.pipeline.outputs import compare_outputs, seeded_inputs

    began = time.perf_counter()
    parameterization(to)
    if calibrate is not None and not mean_norm:
        raise SelectionError("--calibrate sets the running means of --mean-norm: give that too")
    if scale is not None and to != "gmp":
        raise SelectionError(f"--scale {scale}: only gmp has a scale to place, not {to}")
    if to == "sp" and (include or exclude):
        option = "--include" if include else "--exclude"
        raise SelectionError(f"{option}: --to sp folds the whole network: leave it out, or leave out --arch")
    path = checkpoint_of(Path(path))
    arch_args, inputs = arch_args_of(path, arch, arch_args), inputs or input_of(path)
    checkpoint = open_checkpoint(path)
    try:
        target = folders.output_path(checkpoint, to, None if output is None else Path(output))
    except OSError as error:
        raise OutputError(f"-o {output}: {error.strerror}") from error
    folders.refuse_in_place(checkpoint, target)
    single = _as_one_file(checkpoint)
    if not dry_run:
        refuse_existing(target, force)
        folders.refuse_losing(single, target)
    network = load_network(path, arch, arch_args, as_held=True)
    samples = seeded_inputs(network.model, inputs) if inputs and calibrate is None else []
    rules: list[Outcome] = []
    plain = _plain(network.model, fold_bn, rules)
    data = None if calibrate is None else calibration_inputs(calibrate, plain)
    if data is not None:
        # Means are as exact as such inputs need: far from them w·(x − μ) + w·μ cancels, and rounds worse than w·x.
        samples = [(data[:_COMPARED],)]
    model = _converted(
        plain,
        to,
        rules,
        data,
        include=include,
        exclude=exclude,
        mean_norm=mean_norm,
        scale=scale or "outside",
    )
    fidelity = compare_layers(plain, model)
    outputs = compare_outputs(network.model, model, samples) if samples else None
    tensors, records = model.state_dict(), records_of(model)
    nbytes = _nbytes(tensors)
    if not dry_run:
        require_space(target, nbytes + folders.companions_size(checkpoint))
        nbytes = _write(single, target, tensors, records, force)
    layers, others = describe_layers(network.model, model, rules, fidelity)
    kinds = {kind for layer in layers for kind in (layer.source, layer.target)}
    notes = network.notes
    if checkpoint.index is not None:
        notes += (f"{len(checkpoint.files)} shards become one {single.files[0].name}",)
    norms = [record for record in records.values() if record.batch_norm is not None]
    if norms and to == "sp":
        notes += (
            f"batch norms are folded into {len(norms)} layers: the class alone cannot load this file strict, Python loads "
            "it with reparam.graph.apply_records",
        )
    gained = [key.removesuffix(".weight") for key, record in records.items() if record.gained_bias]
    if gained and to == "sp":
        notes += (
            f"a bias from mean normalization stays in {', '.join(gained)}: the class alone cannot load this file strict, "
            "Python loads it with reparam.graph.apply_records",
        )
    if samples and outputs is None:
        notes += ("outputs were not compared: the original gives no finite numbers on these inputs",)
    if mean_norm and not fold_bn:
        notes += _foldable(plain, rules)
    return ModelReport(
        source=checkpoint.path,
        output=target,
        to=to,
        layers=layers,
        others=others,
        bytes_before=sum(file.stat().st_size for file in checkpoint.files),
        bytes_after=nbytes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
        notes=notes,
        backend=for_conversion().name if "gmp" in kinds else None,
        rules=tuple(rules),
        outputs=outputs,
        rewritten=_rewritten(model),
    )


def _plain(model: nn.Module, fold_bn: bool, rules: list[Outcome]) -> nn.Module:
    """The plain layers that the converted ones are made of and compared with."""
    from reparam.graph import fold
    from reparam.graph.exchange import replace_modules
    from reparam.graph.rules.batch_norm import fold_batch_norms
    from reparam.layers import Reparameterized

    if any(isinstance(module, Reparameterized) for module in model.modules()):
        model = fold(model, rules)
    elif fold_bn:
        model = replace_modules(model, lambda module: None)
    model.eval()
    if fold_bn:
        rules += fold_batch_norms(model)
    return model


def _converted(
    plain: nn.Module, to: str, rules: list[Outcome], data: Tensor | None, **options: Any
) -> nn.Module:
    from reparam.graph import convert

    if to == "sp" and not options["mean_norm"] and any(rule.applied for rule in rules):
        return plain
    batches = None if data is None else data.split(_BATCH)  # type: ignore[no-untyped-call]
    try:
        return convert(plain, to, calibrate=batches, report=rules, **options)
    except SelectionError as error:
        option = str(error).partition(" ")[0]
        raise SelectionError(f"{'--' * (option in ('include', 'exclude'))}{error}") from error


def _foldable(plain: nn.Module, rules: Sequence[Outcome]) -> tuple[str, ...]:
    """A line, if batch norms that could be folded follow layers whose means are normalized."""
    from reparam.graph.exchange import replace_modules
    from reparam.graph.rules.batch_norm import fold_batch_norms
    from reparam.graph.rules.mean_norm import RULE

    folded = fold_batch_norms(replace_modules(plain, lambda module: None))
    normalized = {o.layer for o in rules if o.applied and o.rule == RULE}
    both = [o.layer for o in folded if o.applied and o.layer in normalized]
    if not both:
        return ()
    return (
        f"batch norm follows {len(both)} of the layers whose means are normalized: --fold-bn folds it first",
    )


def _as_one_file(checkpoint: Checkpoint) -> Checkpoint:
    """As if the tensors of a sharded set lay in one file of its folder: as they will in the output's."""
    if checkpoint.index is None:
        return checkpoint
    assert checkpoint.folder is not None
    return replace(checkpoint, files=(checkpoint.folder / "model.safetensors",), index=None)


def _write(
    single: Checkpoint,
    target: Path,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, LayerRecord],
    force: bool,
) -> int:
    """Write the output and what goes along; the bytes of its tensors' file."""
    with staged(target, force) as temporary:
        folders.prepare(single, temporary)
        file = folders.file_in(single, temporary, single.files[0])
        save_state_dict(tensors, records, file)
        return file.stat().st_size


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors.values()}.values())


def _rewritten(model: nn.Module) -> bool:
    from reparam.graph.rewritten import Rewritten

    return isinstance(model, Rewritten)
