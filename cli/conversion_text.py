"""What a conversion did, as text: a table of the layers, what was left and why, and how exactly it converts back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import text

if TYPE_CHECKING:
    from reparam.checkpoint import ConversionReport
    from reparam.checkpoint.report import LayerReport

# Up to so many inexact weights are listed one by one; --json has the first ones of every layer.
_NAMED = 16
# What maps angles, by the name of its backend.
_MAPPED_BY = {"compiled": "compiled (numba)", "reference": "reference (torch's own operations)"}


def print_report(report: ConversionReport) -> None:
    """Of a conversion without the network: all there is to say."""
    totals = report.roundtrip
    headings = ["layer", "held as", "shape", "dtype"]
    if totals["checked"]:
        headings += ["inexact", "biases", "row error"] if totals["bias_inexact"] else ["inexact", "row error"]
    text.table(headings, [_row(layer, headings) for layer in report.layers], alike=("held as", "dtype"))
    print()
    _print_left(report)
    _print_others(report)
    print_notes(report)
    print_result(report)


def _row(layer: LayerReport, headings: Sequence[str]) -> list[str]:
    """The cells of those columns; in "biases" how many of them are not exact."""
    cells = {
        "layer": layer.name,
        "held as": f"{layer.source} → {layer.target}" if layer.status == "converted" else layer.source,
        "shape": text.shape(layer.shape),
        "dtype": layer.dtype,
    }
    if (found := layer.fidelity) is not None:
        cells |= {
            "inexact": f"{found.inexact:,}",
            "biases": f"{found.bias_inexact:,}",
            "row error": f"{found.max_row_error:.1e}",
        }
    return [cells.get(heading, "—") for heading in headings]


def _print_left(report: ConversionReport) -> None:
    """Layers that are not converted. Reasons that differ in numbers or the layer's name alone are one."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        if layer.status != "converted":
            reason = re.sub(r"\d+", "…", layer.reason.replace(layer.name, "…"))
            groups.setdefault((layer.status, reason), []).append(layer)
    for (status, _), layers in groups.items():
        left = "would copy" if report.dry_run and status == "copied" else status
        names = text.shorten([layer.name for layer in layers], 3)
        more = ", and so on" * (len({layer.reason for layer in layers}) > 1)
        print(f"{left}: {text.count(len(layers), 'layer')} ({names}): {layers[0].reason}{more}")


def _print_others(report: ConversionReport) -> None:
    copied = "would copy" if report.dry_run else "copied"
    reasons: dict[str, list[str]] = {}
    for key, reason in report.others.items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        print(
            f"{copied} byte for byte: {text.count(len(keys), 'tensor')} ({text.shorten(keys, 3)}): {reason}"
        )


def print_notes(report: ConversionReport) -> None:
    """What is worth telling of layers that were converted, and of the file."""
    converted = report.with_status("converted")
    for line in text.units_read({layer.name: layer.axis for layer in converted if layer.assumed_axis}):
        print(line)
    inside = [layer.name for layer in converted if layer.scale_inside]
    if inside:
        print(
            f"bias kept, scale inside the activation: |b|/‖w‖ is not finite or beyond 2^20: {text.shorten(inside)}"
        )
    for note in report.notes:
        print(note)
    if report.to != "sp" and report.output.suffix != ".safetensors" and _describes_network(report.source):
        print(
            "from_pretrained does not read this folder: train it with reparam finetune or Python, and go back with "
            f"reparam convert {report.output} --to sp"
        )


def _describes_network(source: Path) -> bool:
    """Whether the source is a Hugging Face folder, which others read with from_pretrained."""
    from reparam.checkpoint import open_checkpoint
    from reparam.pipeline.loading import describes_network

    return describes_network(open_checkpoint(source))


def print_result(report: ConversionReport) -> None:
    """How exactly it converts back, sizes, and where it is."""
    converted = len(report.with_status("converted"))
    ratio = report.bytes_after / report.bytes_before if report.bytes_before else 1.0
    sizes = f"{text.size(report.bytes_before)} → {text.size(report.bytes_after)} ({ratio:.2f}×)"
    if report.dry_run:
        print(
            f"would convert {text.count(converted, 'layer')}: {sizes}"
            + (
                "; λ is decided from the values"
                if report.to == "gmp" and not report.roundtrip["checked"]
                else ""
            )
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
    if report.backend is not None:
        print(f"angles mapped by {_MAPPED_BY[report.backend]}")
    grows = any(
        layer.dtype in ("F16", "BF16") and layer.target == "gmp" for layer in report.with_status("converted")
    )
    reason = "; angles are float32, whatever the weights were" if grows else ""
    held = sum(layer.target == report.to for layer in report.with_status("converted"))
    some = f" ({held} of them to {report.to})" if held != converted else ""
    print(f"converted {text.count(converted, 'layer')}{some} in {report.seconds:.1f} s: {sizes}{reason}")
    print(f"wrote {report.output}")
