"""The ratios of benchmarks as bars, in Okabe & Ito's colours, which the colour-blind tell apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.checkpoint.staging import refuse_existing, staged
from reparam.errors import ReparamError

_OURS, _OTHERS, _BAR = "#0072B2", "#999999", "#D55E00"
_COMPARED = (
    "load_file + save_file",
    "load_file + save_file + fsync",
    "Pillow loop",
    "torch.onnx.export",
    "SP",
    "BN",
)


@dataclass(frozen=True)
class Panel:
    """Some ratios to one thing.

    Attributes:
        title: what was measured.
        base: what the ratios are to.
        bars: name, ratio, what it is held to (None: nothing), whether it is this library's.
    """

    title: str
    base: str
    bars: Sequence[tuple[str, float, float | None, bool]]


def plot(value: dict[str, Any], out: Path, force: bool = False) -> None:
    """Draw what a benchmark gave.

    Args:
        value: the JSON value of one, or of all.
        out: the PNG file.
        force: replace it if it exists.

    Raises:
        ReparamError: as :func:`require_drawable`.
    """
    require_drawable(out, force)
    from matplotlib.figure import Figure

    found = panels(value)
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    heights = [max(len(p.bars) for p in found[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure = Figure(figsize=(6.4 * columns, sum(1.1 + 0.3 * h for h in heights) + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=[1.1 + 0.3 * h for h in heights])
    for axes, panel in zip(grid.flat, found, strict=False):
        _draw(axes, panel)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_axis_off()
    machine = value["machine"]
    where = machine.get("gpu", machine["processor"])
    legend = "shorter is faster; blue: reparam, grey: what it is compared with, orange: what it is held to"
    figure.suptitle(f"{where}, torch {machine['torch']}, {machine['date']}\n{legend}", fontsize=10)
    with staged(out, force=force) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def require_drawable(out: Path, force: bool = False) -> None:
    """Refuse what :func:`plot` could not draw, before anything is measured.

    Raises:
        ReparamError: matplotlib is not installed, or ``out`` is no PNG file by its name.
        OutputError: ``out`` exists, and not ``force``, or cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReparamError("--plot: needs matplotlib: pip install 'reparam[plots]'")
    if out.suffix.lower() != ".png":
        raise ReparamError(f"--plot {out}: what is drawn is a PNG file: name it {out.with_suffix('.png')}")
    refuse_existing(out, force, "--plot")


def panels(value: dict[str, Any]) -> list[Panel]:
    """The ratios of a benchmark, or of all."""
    if value["what"] == "all":
        return [panel for one in value["benchmarks"].values() for panel in panels(one)]
    results = value["stages"] if value["what"] == "export" else value["results"]
    if value["what"] == "kernel":
        settings = value["settings"]
        return [
            Panel(
                f"{shape[0]}×{shape[1]}, forward + backward, {settings['dtype']}",
                "time to torch._weight_norm's",
                [
                    (
                        f"reparam ({settings['backend'].partition(' ')[0]})" if _ours(r) else r["name"],
                        r["to_weight_norm"],
                        (r["bar"] or {}).get("to_weight_norm"),
                        _ours(r),
                    )
                    for r in results
                    if r["shape"] == shape
                ],
            )
            for shape in _distinct(r["shape"] for r in results)
        ]
    if value["what"] == "step":
        return [
            Panel(
                f"{model}, training step, {'compiled' if way else 'eager'}, {value['settings']['dtype']}",
                "time to SP's",
                [
                    (r["name"], r["ratio"], r["bar"], r["name"] not in _COMPARED)
                    for r in results
                    if (r["model"], r["compiled"]) == (model, way)
                ],
            )
            for model, way in _distinct((r["model"], r["compiled"]) for r in results)
        ]
    title, base = {
        "convert": ("checkpoint conversion", "time to load_file + save_file's"),
        "data": ("reading images", "time to a Pillow loop's"),
        "export": ("export", "time to torch.onnx.export's"),
    }[value["what"]]
    return [Panel(title, base, [(r["name"], r["ratio"], None, r["name"] not in _COMPARED) for r in results])]


def _ours(result: dict[str, Any]) -> bool:
    return bool(result["name"] == "reparam")


def _distinct(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _draw(axes: Any, panel: Panel) -> None:
    names = [name for name, *_ in panel.bars]
    ratios = [ratio for _, ratio, *_ in panel.bars]
    colors = [_OURS if ours else _OTHERS for *_, ours in panel.bars]
    axes.barh(names, ratios, color=colors, height=0.7)
    most = max(*ratios, *(bar or 0 for _, _, bar, _ in panel.bars), 1.0)
    for row, (_, ratio, bar, _) in enumerate(panel.bars):
        text = f"{ratio:.2f}×" + ("" if bar is None else f" (bar {bar:g}×)")
        axes.text(max(ratio, bar or 0) + 0.015 * most, row, text, va="center", fontsize=8)
        if bar is not None:
            axes.plot([bar, bar], [row - 0.42, row + 0.42], color=_BAR, linewidth=2.5)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, most * 1.3)
    axes.invert_yaxis()
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.base, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
