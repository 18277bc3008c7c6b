"""reparam convert: a checkpoint in another parameterization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reparam.errors import SelectionError

from . import text

if TYPE_CHECKING:
    from reparam.checkpoint import ConversionReport


# Up to so many inexact weights are listed one by one; --json has the first ones of every layer.
_NAMED = 16


def convert(
    path: Annotated[Path, typer.Argument(help="File, index of shards, or folder.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="sp, wn, gmp, or unit (which needs the graph).", show_default=False)
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan from headers; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert trained weights to another parameterization."""
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
            axes=_axes(axis or []),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        _print(report)


def _axes(given: list[str]) -> dict[str, int]:
    axes = {}
    for item in given:
        pattern, _, axis = item.rpartition("=")
        if not pattern or not (axis.isascii() and axis.isdigit()):
            raise SelectionError(f"--axis {item}: expected GLOB=N, such as --axis 'decoder.*=1'")
        axes[pattern] = int(axis)
    return axes


def _print(report: ConversionReport) -> None:
    rows = []
    for layer in report.layers:
        found = layer.fidelity
        measured = found is not None and found.weights > 0
        rows.append(
            [
                layer.name,
                f"{layer.source} → {layer.target}" if layer.status == "converted" else layer.source,
                text.shape(layer.shape),
                layer.dtype,
                layer.status,
                f"{found.inexact + found.bias_inexact:,}" if found and measured else "—",
                f"{found.max_row_error:.1e}" if found and measured else "—",
                layer.reason
                if layer.status != "converted"
                else ("scale inside" if layer.scale_inside else ""),
            ]
        )
    text.table(["layer", "held as", "shape", "dtype", "status", "inexact", "row error", "why"], rows)
    print()
    _print_others(report)
    _print_notes(report)
    _print_result(report)


def _print_others(report: ConversionReport) -> None:
    reasons: dict[str, list[str]] = {}
    for key, reason in report.others.items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        print(f"copied byte for byte: {text.count(len(keys), 'tensor')} ({text.shorten(keys, 3)}): {reason}")


def _print_notes(report: ConversionReport) -> None:
    converted = report.with_status("converted")
    assumed = [layer.name for layer in converted if layer.assumed_axis]
    if assumed:
        print(
            f"unit axis assumed for {text.count(len(assumed), 'layer')} whose shape fits a transposed layer as well "
            f"(--axis GLOB=1 says otherwise; either converts back): {text.shorten(assumed)}"
        )
    inside = [layer.name for layer in converted if layer.scale_inside]
    if inside:
        print(
            f"bias kept, scale inside the activation: |b|/‖w‖ is not finite or beyond 2^20: {text.shorten(inside)}"
        )
    for note in report.notes:
        print(note)


def _print_result(report: ConversionReport) -> None:
    converted = len(report.with_status("converted"))
    ratio = report.bytes_after / report.bytes_before if report.bytes_before else 1.0
    sizes = f"{text.size(report.bytes_before)} → {text.size(report.bytes_after)} ({ratio:.2f}×)"
    if report.dry_run:
        print(
            f"would convert {text.count(converted, 'layer')}: {sizes}"
            + ("; λ is decided from the values" if report.to == "gmp" else "")
        )
        print(f"would write {report.output}")
        return
    totals = report.roundtrip
    if totals["checked"]:
        print(
            f"decoded again and compared: {totals['checked']:,} weights in {totals['rows']:,} rows,"
            f" {totals['inexact']:,} not bit for bit, {totals['bias_inexact']:,} biases not;"
            f" largest row error {totals['max_row_error']:.1e}"
        )
        if 0 < totals["inexact"] <= _NAMED:
            named = [f"{layer.key}{index}" for layer in report.layers for index in layer.inexact_at]
            print(f"not bit for bit: {text.shorten(named, _NAMED)}")
    grows = any(
        layer.dtype in ("F16", "BF16") and layer.target == "gmp" for layer in report.with_status("converted")
    )
    reason = "; angles are float32, whatever the weights were" if grows else ""
    print(f"converted {text.count(converted, 'layer')} in {report.seconds:.1f} s: {sizes}{reason}")
    print(f"wrote {report.output}")
