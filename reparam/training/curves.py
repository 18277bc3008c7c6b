"""Loss and metric of a run as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reparam.checkpoint.staging import staged

# Okabe & Ito's colours, which the colour-blind tell apart.
_TRAIN, _VALIDATION, _BEST = "#0072B2", "#D55E00", "#009E73"
_SHARES = ("accuracy", "top5")


def plot_curves(metrics: Path, out: Path) -> Path:
    """Draw the losses and the metric over the steps of a run.

    Args:
        metrics: the run's metrics.jsonl.
        out: the PNG file; replaced if it exists.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OutputError: ``out`` cannot be written.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [line["loss"] for line in steps]
    left.plot([line["step"] for line in steps], losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
    window = max(len(losses) // 50, 1)
    label = f"training, mean of {window} steps" if window > 1 else "training"
    left.plot([line["step"] for line in steps], _smoothed(losses, window), color=_TRAIN, label=label)
    at = [line["step"] for line in evaluations]
    left.plot(
        at, [line["validation_loss"] for line in evaluations], "o-", color=_VALIDATION, label="validation"
    )
    left.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    left.legend()
    _metric(right, evaluations)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0, max(evaluations[-1]["step"], 1))
        axes.margins(x=0.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with staged(out, force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return out


def _metric(axes: Any, evaluations: Sequence[dict[str, Any]]) -> None:
    known = {"epoch", "step", "train_loss", "validation_loss", "best"}
    name = next(key for key in evaluations[0] if key not in known)
    unit = " [%]" if name in _SHARES else ""
    values = [line[name] * (100 if unit else 1) for line in evaluations]
    axes.plot([line["step"] for line in evaluations], values, "o-", color=_VALIDATION)
    best = max(i for i, line in enumerate(evaluations) if line["best"])
    axes.plot(
        evaluations[best]["step"],
        values[best],
        "*",
        color=_BEST,
        markersize=16,
        label=f"best: {values[best]:.4g}{' %' * bool(unit)}",
    )
    axes.set(xlabel="optimizer step", ylabel=f"{name}{unit}", title=f"Validation {name}")
    axes.legend()


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to ``window`` values up to each."""
    found, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        found.append(total / min(i + 1, window))
    return found
