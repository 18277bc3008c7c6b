"""Exported files that serve as templates, and what a refitted one has to compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from template_cases import (
    IMAGE,
    ROW,
    SEQUENCE,
    bare,
    chain,
    derived,
    normed,
    reader,
    single,
    tabled,
    trained,
)  # fmt: skip
from torch import nn

from reparam.export import export_onnx_model
from reparam.graph import parse_spec

BUILD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bare": (bare, IMAGE),
    "normed": (normed, IMAGE),
    "reader": (reader, SEQUENCE),
    "chain": (chain, ROW),
    "derived": (derived, ROW),
    "single": (single, ROW),
    "tabled": (tabled, ROW),
}
#: float32's rounding over a few layers, of the output's scale
ROUNDING = 2e-6


class Templates:
    """Exports of the plain networks, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, **options: Any) -> Path:
        path = self._folder / f"{name}{''.join(options)}" / "base.onnx"
        if not path.exists():
            path.parent.mkdir()
            build, spec = BUILD[name]
            export_onnx_model(trained(build, 1), [parse_spec(spec)], path, **options)
        return path


def assert_computes(path: Path, model: nn.Module, spec: str) -> None:
    """The file in ONNX Runtime against the network in float64."""
    x = parse_spec(spec).sample(torch.Generator().manual_seed(3), {"N": 3})
    with torch.no_grad():
        expected = model.double().eval()(x.double()).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
