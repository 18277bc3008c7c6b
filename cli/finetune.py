"""reparam finetune: train a checkpoint further in the parameterization it is held in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import parse_arch_args
from .text import size


def finetune(
    path: Annotated[Path, typer.Argument(help="Checkpoint, in any parameterization.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of IDX files (MNIST family).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("run"),
    arch: Annotated[
        str | None,
        typer.Option(
            help="The network: pkg.module:callable or path/to/file.py:callable; a Hugging Face folder needs none."
        ),
    ] = None,
    arch_arg: Annotated[list[str] | None, typer.Option(help="k=v, an argument of that callable.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Images of one step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of everything but angles.")] = 0.01,
    angle_lr: Annotated[float, typer.Option(help="Learning rate of theta.")] = 0.001,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the order of the images.")] = 0,
    mean: Annotated[
        float | None, typer.Option(help="Mean of the pixels in [0, 1]; measured without.")
    ] = None,
    std: Annotated[
        float | None, typer.Option(help="Standard deviation of the pixels; measured without.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run's files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune in the parameterization a checkpoint is held in."""
    from reparam import pipeline
    from reparam.training import Recipe

    run = pipeline.finetune(
        path,
        arch,
        data,
        out,
        Recipe(steps, batch_size, lr, angle_lr, momentum, seed),
        arch_args=parse_arch_args(arch_arg),
        mean=mean,
        std=std,
        force=force,
        on_step=lambda step, loss: print(f"step {step}/{steps}  loss {loss:.4f}", file=sys.stderr),
    )
    for note in run.notes:
        print(note, file=sys.stderr)
    result = run.result
    if as_json:
        value = {
            "output": str(run.output),
            "steps": len(result.losses),
            "loss": result.losses[-1],
            "accuracy_before": result.accuracy_before,
            "accuracy_after": result.accuracy_after,
        }
        print(json.dumps(value))
    else:
        print(f"test accuracy {result.accuracy_before:.1%} -> {result.accuracy_after:.1%} in {steps} steps")
        print(f"wrote {run.output} ({size(run.nbytes)})")
