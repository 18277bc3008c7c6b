"""Layers whose units are not on the first axis, cut into many blocks, and what a file of any parameterization holds of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_kinds import Kind, rows_by_loops
from safetensors.torch import load_file, save_file
from torch import Tensor

from reparam.checkpoint import convert_checkpoint, mapping, running, source
from reparam.checkpoint.dialects import bias_key
from reparam.checkpoint.report import ConversionReport

TURNED: Mapping[str, Kind] = {
    "hf conv1d": Kind("h.c_fc.weight", (13, 22), 1, bias=(22,)),
    "hf conv1d, square": Kind("h.c_proj.weight", (11, 11), 1, bias=(11,)),
    "conv transpose 1d": Kind("u.weight", (7, 10, 3), 1, bias=(10,)),
    "conv transpose 1d, no bias": Kind("u.weight", (7, 10, 3), 1),
    "conv transpose 2d": Kind("u.weight", (5, 6, 3, 2), 1, bias=(6,)),
    "conv transpose 1d, grouped": Kind("u.weight", (6, 8, 3), 1, 2, bias=(16,)),
    "conv transpose 2d, grouped": Kind("u.weight", (12, 2, 3, 2), 1, 6, bias=(12,)),
    "experts (E, out, in)": Kind("mlp.experts.up", (3, 7, 5), 1, 3, bias=(3, 7)),
    "experts (E, in, out)": Kind("mlp.experts.down", (3, 5, 7), 2, 3, bias=(3, 7)),
}
#: of an angle, a radius, a norm or λ in float32: rounded once, and once more on the way there
FLOAT32 = 2.0**-22
#: ‖Δw‖/‖w‖ there and back
ROW = {torch.float32: 2e-7, torch.bfloat16: 1e-6}


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 weights, two of them a task; the norms of 16 weights summed at once."""
    monkeypatch.setattr(mapping, "_BLOCK", 16)
    monkeypatch.setattr(running, "_BLOCKS", 2)
    monkeypatch.setattr(source, "_SUMMED", 16)


def saved(kind: Kind, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Tensor, Tensor | None]:
    weight, bias = kind.tensors(dtype)
    state = {kind.key: weight} if bias is None else {kind.key: weight, bias_key(kind.key): bias}
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors", weight, bias


def convert(file: Path, kind: Kind, *route: str) -> tuple[Path, list[ConversionReport]]:
    """One conversion after the other, each a file beside the last."""
    reports = []
    for to in route:
        target = file.with_name(f"{file.stem}.{to}.safetensors")
        reports.append(convert_checkpoint(file, to, output=target, axes={kind.key: kind.axis}))
        file = target
    return file, reports


def rows_of_angles(radius: Tensor, theta: Tensor) -> np.ndarray[Any, Any]:
    """w_i = r·sin t_i·∏ cos t_j, coordinate by coordinate in float64."""
    rows = []
    for r, angles in zip(radius.tolist(), theta.tolist(), strict=True):
        row, product = [], r
        for t in angles:
            row.append(product * math.sin(t))
            product *= math.cos(t)
        rows.append([*row, product])
    return np.array(rows)


def assert_holds(file: Path, kind: Kind, weight: Tensor, bias: Tensor | None) -> None:
    """What this file of any parameterization holds is the weight and bias it was made of, by loops over elements."""
    tensors, stem = load_file(file), kind.key.removesuffix(".weight")
    rows = rows_by_loops(weight.double(), kind.axis, kind.groups).numpy()
    norms = np.linalg.norm(rows, axis=1)
    row_bar, found_bias = ROW[weight.dtype], tensors.get(bias_key(kind.key))
    if kind.key in tensors:
        found = rows_by_loops(tensors[kind.key].double(), kind.axis, kind.groups).numpy()
    elif kind.key + "_v" in tensors:
        v, g = tensors[kind.key + "_v"].double().numpy(), tensors[kind.key + "_g"].numpy()
        length = np.array([np.linalg.norm(v[i]) for i in range(len(v))])
        np.testing.assert_allclose(g.reshape(-1), length, rtol=FLOAT32)
        found = rows_by_loops(torch.from_numpy(v), kind.axis, kind.groups).numpy()
    else:
        r, theta = tensors[f"{stem}.r"], tensors[f"{stem}.theta"]
        np.testing.assert_allclose(r.numpy(), norms, rtol=FLOAT32)
        found = rows_of_angles(r, theta)
        if bias is not None:
            expected = bias.double().reshape(-1).numpy() / norms
            np.testing.assert_allclose(tensors[f"{stem}.lambda_"].reshape(-1).numpy(), expected, rtol=FLOAT32)
    assert (np.linalg.norm(found - rows, axis=1) / norms).max() <= row_bar
    if bias is not None and found_bias is not None:
        assert found_bias.shape == bias.shape
        np.testing.assert_allclose(found_bias.double().numpy(), bias.double().numpy(), rtol=FLOAT32)
