"""The benchmark of exports: that it measures what it says. Its figures are not tested."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from reparam.bench.export import BARE, PROVEN, REFIT, bench_export
from reparam.errors import CheckFailedError
from reparam.graph import InputSpec, parse_spec
from reparam.layers import Reparameterized

SPECS = [parse_spec("x=float32[N,3,8,8]")]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def test_stages_and_files() -> None:
    seen: list[tuple[bool, bool, bool]] = []
    told: list[str] = []

    def verify(model: nn.Module, folded: nn.Module, path: Path, specs: Sequence[InputSpec]) -> bool:
        held = [any(isinstance(m, Reparameterized) for m in one.modules()) for one in (model, folded)]
        seen.append((held[0], held[1], path.is_file()))
        return True

    value = json.loads(json.dumps(bench_export(network(), SPECS, verify, 1, 3, told.append), allow_nan=False))
    assert seen == [(True, False, True)] * 2
    assert [stage["name"] for stage in value["stages"]] == [BARE, PROVEN, REFIT]
    assert all(stage["seconds"] > 0 for stage in value["stages"])
    assert value["stages"][0]["ratio"] == 1
    bare, proven = value["files"]
    assert bare["operators"] == proven["operators"] == {"Conv": 1, "Relu": 1, "Reshape": 1, "Gemm": 1}
    assert bare["ratio"] == 1
    assert all(file["milliseconds"] > 0 and file["nbytes"] > 0 for file in value["files"])
    assert len(told) == 2 * 3 + 1
    assert value["settings"] == {"model": "Sequential", "to": "gmp", "repeats": 1, "turns": 3}


def test_a_wrong_file_is_no_result() -> None:
    with pytest.raises(CheckFailedError, match="does not compute what the model computes"):
        bench_export(network(), SPECS, lambda *_: False, 1, 1, lambda _: None)
