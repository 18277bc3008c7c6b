"""reparam bench: how fast things are on this machine, as ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.errors import ReparamError

from . import text

bench = typer.Typer(help="Measure on this machine, as ratios within one run.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Measure on this machine, as ratios within one run."""


@bench.command()
def convert(
    gigabytes: Annotated[float, typer.Option("--size", help="GB of the generated checkpoint.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="F32, F16, BF16 or F64.")] = "F32",
    repeats: Annotated[int, typer.Option(help="Of every job; medians are reported.")] = 3,
    where: Annotated[Path | None, typer.Option("--dir", help="Work here; needs five times the size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Conversions against load_file + save_file, with peak memory."""
    from reparam.bench.convert import bench_convert
    from reparam.dtypes import FLOATING

    if dtype not in FLOATING:
        raise ReparamError(f"--dtype {dtype}: one of {', '.join(sorted(FLOATING))}")
    value = bench_convert(gigabytes, dtype, repeats, lambda what: print(what, file=sys.stderr), where)
    if as_json:
        print(json.dumps(value))
        return
    rows = [
        [r["name"], f"{r['ratio']:.2f}×", f"{r['durable_ratio']:.2f}×", f"{r['seconds']:.2f}", f"{r['peak_mb']:.0f}",
         f"{r['read_mb']:.0f}", f"{r['written_mb']:.0f}"]
        for r in value["results"]
    ]  # fmt: skip
    text.table(["job", "time", "time to + fsync", "seconds", "peak MB", "read MB", "written MB"], rows)
    print(f"\n{gigabytes:g} GB of {dtype}, {repeats} repeats; {_machine(value)}")


@bench.command()
def kernel(
    repeats: Annotated[int, typer.Option(min=1, help="Of every job; medians are reported.")] = 9,
    largest: Annotated[
        int | None, typer.Option("--max-weights", help="Leave out shapes of more weights than this.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The GmP map, forward and backward, against weight norm, naive autograd and a copy."""
    from reparam.bench.kernel import bench_kernel

    value = bench_kernel(repeats, lambda what: print(what, file=sys.stderr), largest)
    if as_json:
        print(json.dumps(value))
        return
    rows = []
    for r in value["results"]:
        bar = r["bar"] or {}
        ratios = [_ratio(r[key], bar.get(key)) for key in ("to_weight_norm", "to_naive", "to_copy")]
        rows.append([text.shape(r["shape"]), r["name"], *ratios, f"{r['seconds'] * 1e3:.3f}"])
    text.table(["shape", "job", "to weight norm", "to naive", "to copy", "ms"], rows)
    settings = value["settings"]
    print(
        f"\n{settings['pass']} in {settings['dtype']}, {repeats} repeats; {_machine(value)},"
        f" {text.count(value['machine']['torch_threads'], 'thread')}"
    )


def _ratio(ratio: float, bar: float | None) -> str:
    """A ratio beside the bar it is held to."""
    return f"{ratio:.2f}×" + ("" if bar is None else f" (bar {bar:g}×)")


def _machine(value: dict[str, Any]) -> str:
    machine = value["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
