"""reparam export: fold a checkpoint into an ONNX file that provably computes the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import parse_arch_args
from .text import size


def export(
    path: Annotated[Path, typer.Argument(help="Checkpoint, in any parameterization.", show_default=False)],
    onnx: Annotated[Path, typer.Option(help="The ONNX file to write.", show_default=False)],
    arch: Annotated[
        str | None,
        typer.Option(
            help="The network: pkg.module:callable or path/to/file.py:callable; a Hugging Face folder needs none."
        ),
    ] = None,
    arch_arg: Annotated[list[str] | None, typer.Option(help="k=v, an argument of that callable.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="N,3,32,32 (a letter is a dynamic axis) or name=float32[N,3,32,32]."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operator set.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp16 or bf16: cast weights, inputs and outputs.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs of the comparison.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold and export to ONNX, compared in ONNX Runtime first."""
    from reparam import pipeline
    from reparam.graph import parse_spec
    from reparam.verification import VerificationError

    specs = [parse_spec(text) for text in inputs or ()]
    if sys.stderr.isatty():
        print(f"exporting {path} and comparing in ONNX Runtime", file=sys.stderr)
    try:
        done = pipeline.export_onnx(
            path,
            arch,
            specs,
            onnx,
            arch_args=parse_arch_args(arch_arg),
            opset=opset,
            dtype=dtype,
            seed=seed,
            force=force,
        )
    except VerificationError as error:
        if as_json:
            print(json.dumps({"output": None, **error.report.to_json()}))
        raise
    for note in done.notes:
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({"output": str(done.output), **done.report.to_json()}))
    else:
        for check in done.report.checks:
            print(check)
        print(f"wrote {done.output} ({size(done.nbytes)})")
