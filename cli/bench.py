"""reparam bench: how fast things are on this machine, as ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.errors import ReparamError

from . import text
from .options import ArchArgOption, ArchOption, InputOption, parse_arch_args

_BUNDLED, _BUNDLED_INPUT = "reparam.demo.model:small_cnn", "N,1,28,28"

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


@bench.command()
def data(
    path: Annotated[
        str | None, typer.Option("--data", help="Encoded images, all of one size; generated ones without.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many are read.")] = 2000,
    pixels: Annotated[int, typer.Option(min=8, help="Width and height of generated ones.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one batch.")] = 64,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, help="Processes; repeatable, a job each. 0 and 2 without.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of every job; medians are reported.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Reading and augmenting images for training, against a loop over Pillow."""
    from reparam.bench.data import bench_data

    counts = workers if workers else [0, 2]
    value = bench_data(
        path, images, pixels, batch_size, counts, repeats, lambda what: print(what, file=sys.stderr)
    )
    if as_json:
        print(json.dumps(value))
        return
    rows = [
        [r["name"], f"{r['ratio']:.2f}×", f"{r['seconds']:.2f}", f"{r['images_per_second']:.0f}"]
        for r in value["results"]
    ]
    text.table(["job", "time to the loop's", "seconds", "images a second"], rows)
    settings = value["settings"]
    print(
        f"\n{settings['images']} images of {text.shape(settings['shape'])} in batches of {settings['batch_size']}, "
        f"{settings['repeats']} repeats; {_machine(value)}"
    )


@bench.command()
def export(
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    inputs: InputOption = None,
    to: Annotated[str, typer.Option(help="wn, gmp or unit: what the network is exported from.")] = "gmp",
    repeats: Annotated[int, typer.Option(min=1, help="Of every stage; medians are reported.")] = 3,
    turns: Annotated[int, typer.Option(min=1, help="Of every file in ONNX Runtime.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export with its proof, and refit, against a bare torch.onnx.export; and how fast the files run.

    Of a small bundled network, or of --arch with random weights.
    """
    from reparam.bench.export import bench_export
    from reparam.graph import load_architecture, parse_spec

    if (arch is None) != (not inputs):
        raise ReparamError(
            "--input: what the network of --arch takes" if arch else "--arch: what takes the --input"
        )
    specs = [parse_spec(given) for given in inputs or [_BUNDLED_INPUT]]
    model = load_architecture(arch or _BUNDLED, parse_arch_args(arch_arg))
    value = bench_export(model, specs, repeats, turns, lambda what: print(what, file=sys.stderr), to)
    if as_json:
        print(json.dumps(value))
    else:
        _print_export(value)


def _print_export(value: dict[str, Any]) -> None:
    rows = [
        [
            s["name"],
            f"{s['seconds']:.2f}",
            f"{s['ratio']:.2f}×",
            f"{s['cpu_seconds']:.2f}",
            f"{s['cpu_ratio']:.2f}×",
        ]
        for s in value["stages"]
    ]
    text.table(["stage", "seconds", "to torch", "CPU seconds", "to torch"], rows)
    files = value["files"]
    print()
    rows = [
        [f["name"], f"{f['milliseconds']:.3f}", f"{f['ratio']:.2f}×", text.size(f["nbytes"])] for f in files
    ]
    text.table(["file", "ms", "to torch's", "size"], rows)
    print()
    operators = dict.fromkeys(name for file in files for name in file["operators"])
    rows = [[name, *(str(file["operators"].get(name, 0)) for file in files)] for name in operators]
    text.table(["operator", *(file["name"] for file in files)], rows)
    settings = value["settings"]
    print(
        f"\n{settings['model']} from {settings['to']}, {settings['repeats']} repeats, files {settings['turns']} times; "
        f"{_machine(value)}"
    )


def _ratio(ratio: float, bar: float | None) -> str:
    """A ratio beside the bar it is held to."""
    return f"{ratio:.2f}×" + ("" if bar is None else f" (bar {bar:g}×)")


def _machine(value: dict[str, Any]) -> str:
    machine = value["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
