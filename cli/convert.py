"""reparam convert: a checkpoint in another parameterization."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.errors import SelectionError

from . import conversion_text, rules, text
from .options import ArchArgOption, ArchOption, InputOption, parse_arch_args, parse_axes, parse_to


def convert(
    path: Annotated[Path, typer.Argument(help="File, index of shards, or folder.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="sp, wn, gmp, or unit (which needs the network).", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; beside the input by default.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers that match this glob; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No layer that matches this glob; repeatable.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Names of WN tensors: weight_norm, parametrizations, clip-gmp.")
    ] = None,
    theta_dtype: Annotated[
        str | None, typer.Option(help="float32 or float64, of theta, r, lambda_ and g.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Leave a layer as it is where it would not come back bit for bit.")
    ] = False,
    axis: Annotated[
        list[str] | None, typer.Option(help="GLOB=N, the axis of the output units; repeatable.")
    ] = None,
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    inputs: InputOption = None,
    fold_bn: Annotated[
        bool, typer.Option("--fold-bn", help="Fold batch norms into the layers before them first.")
    ] = False,
    mean_norm: Annotated[
        bool, typer.Option("--mean-norm", help="Normalize means: of inputs (gmp, unit), of units (wn).")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Data that sets those means: a folder that finetune --data takes, or inputs in .npz or .safetensors "
            "(FILE:NAME, one array of several)."
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Of gmp: outside (after the activation; default) or inside the layer.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert trained weights to another parameterization.

    A run's folder stands for its best checkpoint. With --arch, or graph options on a Hugging Face folder, the whole
    network is converted: the output layer is known, batch norms fold, scales find their place.
    """
    from reparam.pipeline.runs import checkpoint_of

    parse_to(to)
    path = checkpoint_of(path)
    if scale not in (None, "outside", "inside"):
        raise SelectionError(f"--scale {scale}: outside or inside")
    graph = {
        "--fold-bn": fold_bn,
        "--mean-norm": mean_norm,
        "--calibrate": calibrate,
        "--scale": scale,
        "--input": inputs,
    }
    asked = [option for option, value in graph.items() if value]
    if arch is not None or _takes_network(path, bool(asked) or to == "unit"):
        tensors_only = {"--layout": layout, "--theta-dtype": theta_dtype, "--exact": exact, "--axis": axis}
        for option, value in tensors_only.items():
            if value:
                raise SelectionError(
                    f"{option}: belongs to the conversion of tensors alone: leave out {option}, or leave out "
                    f"{', '.join((['--arch'] if arch else []) + asked) or '--to unit'}"
                )
        _convert_model(
            as_json,
            path=path,
            to=to,
            arch=arch,
            arch_args=parse_arch_args(arch_arg),
            output=output,
            include=include or (),
            exclude=exclude or (),
            fold_bn=fold_bn,
            mean_norm=mean_norm,
            calibrate=calibrate,
            scale=scale,
            inputs=inputs or (),
            force=force,
            dry_run=dry_run,
        )
        return
    if asked or arch_arg:
        raise SelectionError(
            f"{asked[0] if asked else '--arch-arg'}: needs the network: give --arch file.py:fn, or a folder with config.json"
        )
    from reparam.checkpoint import convert_checkpoint

    with text.progress(f"{path.name} -> {to}") as progress:
        report = convert_checkpoint(
            path,
            to,
            output=output,
            include=include or (),
            exclude=exclude or (),
            layout=layout,
            theta_dtype=theta_dtype,
            exact=exact,
            axes=parse_axes(axis),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        conversion_text.print_report(report)


def _takes_network(path: Path, asked: bool) -> bool:
    """Whether a Hugging Face folder is to be converted as a network: if that was asked for, or was done to it before."""
    from reparam.checkpoint import open_checkpoint
    from reparam.pipeline.loading import describes_network

    if not asked and not os.path.isdir(path):  # not Path's: it raises for names that cannot be
        return False
    checkpoint = open_checkpoint(path)
    rewritten = any(record.rewritten is not None for record in checkpoint.records.values())
    return (asked or rewritten) and describes_network(checkpoint)


def _convert_model(as_json: bool, **options: Any) -> None:
    from reparam import pipeline

    if sys.stderr.isatty():
        print(f"converting {options['path']} in its network", file=sys.stderr)
    report = pipeline.convert_model(**options)
    if as_json:
        print(json.dumps(report.to_json()))
        return
    rules.print_rules(report)
    print()
    rules.print_others(report)
    conversion_text.print_notes(report)
    if report.outputs is not None:
        print(
            f"outputs of both networks compared in float64: they differ by at most {report.outputs.max_rel:.1e} of their "
            f"scale (rounding explains {report.outputs.tolerance:.1e})"
        )
    elif not any(note.startswith("outputs were not compared") for note in report.notes):
        print("outputs were not compared: --input says what the network takes, such as --input N,3,224,224")
    if report.rewritten:
        print(
            "scales stand after activations, which the class alone does not compute: Python loads this file with "
            "reparam.graph.apply_records; --scale inside keeps the class"
        )
    conversion_text.print_result(report)
