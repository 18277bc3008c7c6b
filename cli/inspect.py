"""reparam inspect: what is in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import text

if TYPE_CHECKING:
    from reparam.checkpoint import Inspection
    from reparam.checkpoint.layers import Layer

# classes, or values per channel, that a line shows
_NAMED = 12


def inspect(
    path: Annotated[
        Path, typer.Argument(help="File, index of shards, or folder; of a run too.", show_default=False)
    ],
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the weights too: norms, dead units, zeros.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is in a checkpoint; headers only unless --stats."""
    from reparam.checkpoint import inspect_checkpoint
    from reparam.pipeline.runs import checkpoint_of, describe

    path = checkpoint_of(path)
    found, told = inspect_checkpoint(path, stats), describe(path)
    if as_json:
        print(json.dumps(found.to_json() | ({"run": told} if told else {})))
        return
    headings = ["layer", "held as", "shape", "dtype"]
    headings += ["‖w‖ min", "‖w‖ max", "dead", "zeros"] if stats else ["units", "fan-in", "bias"]
    rows = [_row(found, i, stats) for i in range(len(found.layers))]
    text.table(headings, rows, alike=("held as", "dtype"))
    _summary(found)
    _run(told)


def _row(found: Inspection, i: int, stats: bool) -> list[str]:
    layer = found.layers[i]
    spec = layer.spec
    held = (
        layer.kind if layer.dialect in ("plain", "gmp", "weight_norm") else f"{layer.kind} ({layer.dialect})"
    )
    stored = found.checkpoint.tensors[layer.weight_key].dtype
    dtype = spec.dtype if stored == spec.dtype else f"{spec.dtype} (as {stored})"
    row = [layer.name, held, text.shape(spec.shape), dtype]
    if not stats:
        return [*row, str(spec.units), str(spec.fan_in), layer.bias or "—"]
    numbers = found.statistics[layer.key]
    if numbers.non_finite:
        return [*row, "NaN/Inf", "NaN/Inf", "—", "—"]
    norms = (f"{numbers.smallest:.4g}", f"{numbers.largest:.4g}")
    return [*row, *norms, str(numbers.dead), f"{numbers.zeros:.1%}"]


def _summary(found: Inspection) -> None:
    checkpoint = found.checkpoint
    print()
    buffers = f" and {found.buffers:,} in buffers" if found.buffers else ""
    print(
        f"{text.count(len(found.layers), 'layer')} and {text.count(len(found.others), 'other tensor')}, "
        f"{found.parameters:,} parameters{buffers}, "
        f"{text.size(checkpoint.nbytes)} in {text.count(len(checkpoint.files), 'file')}"
    )
    reasons: dict[str, list[str]] = {}
    for key, reason in found.others.items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        print(f"  no layer: {text.shorten(keys, 3)}: {reason}")
    for alias, key in checkpoint.aliases.items():
        print(f"  tied: {alias} shares {key}")
    assumed = {layer.name: layer.spec.unit.axis for layer in found.layers if layer.assumed_axis}
    for line in text.units_read(assumed):
        print(f"  {line}")
    others = [layer.name for layer in found.layers if layer.kind == "wn" and not _g_a_unit(found, layer)]
    if others:
        print(f"  g is not one a unit, but one an expert, input channel or so: {text.fitting(others, 30)}")
    for note in checkpoint.notes:
        print(f"  {note}")


def _g_a_unit(found: Inspection, layer: Layer) -> bool:
    return found.checkpoint.tensors[layer.tensors["weight_g"]].numel == layer.spec.units


def _run(told: Mapping[str, Any]) -> None:
    """What the run that the checkpoint is of says of it."""
    if not told:
        return
    print(f"\nrun {told['folder']}" + f": {told['best']}" * bool(told["best"]))
    if told["arch"]:
        print(f"  the network, which commands are told and take from no file: {told['arch']}")
    if told["input"]:
        print(f"  input: {told['input']}")
    for name in ("classes", "mean", "std"):
        if told[name]:
            print(f"  {name}: {text.shorten([_short(value) for value in told[name]], _NAMED)}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
