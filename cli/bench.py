"""reparam bench: how fast things are on this machine, as ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.errors import ReparamError

from . import bench_tables
from .options import ArchArgOption, ArchOption, InputOption, parse_arch_args

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw the ratios as bars into this PNG file.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is CUDA where there is one.")]
TypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

bench = typer.Typer(help="Measure on this machine, as ratios within one run.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Measure on this machine, as ratios within one run."""


@bench.command()
def kernel(
    repeats: Annotated[int, typer.Option(min=1, help="Of every job; medians are reported.")] = 9,
    largest: Annotated[
        int | None, typer.Option("--max-weights", help="Leave out shapes of more weights than this.")
    ] = None,
    dtype: TypeOption = "float32",
    device: DeviceOption = "auto",
    plot: PlotOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The GmP map, forward and backward, against weight norm, naive autograd and a copy."""
    from reparam.bench.kernel import bench_kernel

    _check(plot, force)
    _give(bench_kernel(repeats, _tell, largest, dtype, device), as_json, plot, force)


@bench.command()
def step(
    model: Annotated[
        list[str] | None, typer.Option(help="vgg6 or resnet34; repeatable. Both without.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of one batch: 256 on a GPU, 8 elsewhere.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of every step; medians are reported.")] = 5,
    dtype: TypeOption = "float32",
    device: DeviceOption = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile as well: minutes on a CPU.")
    ] = False,
    plot: PlotOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The training step of VGG-6 and ResNet-34 in SP, BN, WN, WN+MBN, GmP and GmP+MN."""
    from reparam.bench.networks import NETWORKS
    from reparam.bench.step import bench_step

    _check(plot, force)
    models = list(dict.fromkeys(model)) if model else list(NETWORKS)
    value = bench_step(models, batch_size, repeats, _tell, dtype, device, compiled)
    _give(value, as_json, plot, force)


@bench.command()
def convert(
    gigabytes: Annotated[
        float,
        typer.Option(
            "--size", help="GB of the generated checkpoint, at least: four layers make 0.27 billion weights."
        ),
    ] = 1.0,
    dtype: Annotated[str, typer.Option(help="F32, F16, BF16 or F64.")] = "F32",
    repeats: Annotated[int, typer.Option(help="Of every job; medians are reported.")] = 3,
    where: Annotated[Path | None, typer.Option("--dir", help="Work here; needs five times the size.")] = None,
    plot: PlotOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Conversions against load_file + save_file, with peak memory."""
    from reparam.bench.convert import bench_convert
    from reparam.dtypes import FLOATING

    if dtype not in FLOATING:
        raise ReparamError(f"--dtype {dtype}: one of {', '.join(sorted(FLOATING))}")
    _check(plot, force)
    _give(bench_convert(gigabytes, dtype, repeats, _tell, where), as_json, plot, force)


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
    plot: PlotOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reading and augmenting images for training, against a loop over Pillow."""
    from reparam.bench.data import bench_data

    _check(plot, force)
    value = bench_data(path, images, pixels, batch_size, workers if workers else [0, 2], repeats, _tell)
    _give(value, as_json, plot, force)


@bench.command()
def export(
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    inputs: InputOption = None,
    to: Annotated[str, typer.Option(help="wn, gmp or unit: what the network is exported from.")] = "gmp",
    repeats: Annotated[int, typer.Option(min=1, help="Of every stage; medians are reported.")] = 3,
    turns: Annotated[int, typer.Option(min=1, help="Of every file in ONNX Runtime.")] = 50,
    plot: PlotOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export with its proof, and refit, against a bare torch.onnx.export; and how fast the files run.

    Of a small bundled network, or of --arch with random weights.
    """
    from reparam.bench.all_benchmarks import EXPORTED, EXPORTED_INPUT
    from reparam.bench.export import bench_export
    from reparam.graph import load_architecture, parse_spec

    if (arch is None) != (not inputs):
        raise ReparamError(
            "--input: what the network of --arch takes" if arch else "--arch: what takes the --input"
        )
    _check(plot, force)
    specs = [parse_spec(given) for given in inputs or [EXPORTED_INPUT]]
    model = load_architecture(arch or EXPORTED, parse_arch_args(arch_arg))
    _give(bench_export(model, specs, repeats, turns, _tell, to), as_json, plot, force)


@bench.command("all")
def everything(
    dtype: TypeOption = "float32",
    device: DeviceOption = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="As little as runs everything once: its figures say nothing.")
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON here, too.")] = None,
    plot: PlotOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """kernel, step, data, convert (0.5 GB of BF16) and export, one after the other."""
    from reparam.bench.all_benchmarks import bench_all

    _check(plot, force, output)
    _give(bench_all(_tell, dtype, device, quick), as_json, plot, force, output)


def _tell(what: str) -> None:
    print(what, file=sys.stderr)


def _check(plot: Path | None, force: bool, output: Path | None = None) -> None:
    """Refuse what cannot be drawn or written before minutes are spent."""
    if plot is not None:
        from reparam.bench.plot import require_drawable

        require_drawable(plot, force)
    if output is not None:
        from reparam.checkpoint.staging import refuse_existing

        refuse_existing(output, force)


def _give(
    value: dict[str, Any], as_json: bool, plot: Path | None, force: bool, output: Path | None = None
) -> None:
    if output is not None:
        from reparam.checkpoint.staging import staged

        with staged(output, force) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from reparam.bench.plot import plot as draw

        draw(value, plot, force)
    if as_json:
        print(json.dumps(value))
    else:
        bench_tables.show(value)
    for out in filter(None, (output, plot)):
        print(f"wrote {out}", file=sys.stderr if as_json else sys.stdout)
