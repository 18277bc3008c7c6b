"""Layers whose units are not on the first axis are cut too: the same bytes as whole, and what loops over elements give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from column_cases import ROW, TURNED, assert_holds, convert, cut_small, saved
from layer_kinds import Kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import bits
from torch import Tensor

from reparam.checkpoint import mapping, running, source, workers
from reparam.checkpoint.dialects import bias_key
from reparam.checkpoint.reading import Checkpoint
from reparam.checkpoint.writing import SafetensorsWriter
from reparam.errors import NonFiniteError

ROUTES = (("gmp", "sp"), ("wn", "gmp", "wn", "sp"), ("gmp", "wn", "sp"))

turned = pytest.mark.parametrize("kind", TURNED.values(), ids=TURNED)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


@pytest.mark.parametrize("route", ROUTES, ids="-".join)
@pytest.mark.parametrize("dtype", ROW)
@turned
def test_blocks_make_no_difference_and_no_error(
    kind: Kind, dtype: torch.dtype, route: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file, weight, bias = saved(kind, tmp_path, dtype)
    (tmp_path / "whole").mkdir()
    file_whole = tmp_path / "whole" / file.name
    file_whole.write_bytes(file.read_bytes())
    _, expected = convert(file_whole, kind, *route)
    request.getfixturevalue("small")
    _, reports = convert(file, kind, *route)
    for report, whole in zip(reports, expected, strict=True):
        assert report.output.read_bytes() == whole.output.read_bytes(), report.output.name
        assert report.layers == whole.layers
        assert report.layers[0].status == "converted"
        assert_holds(report.output, kind, weight, bias)


@pytest.mark.skipif(not workers._CAN_FORK, reason="this system does not fork")
@pytest.mark.parametrize("route", ROUTES, ids="-".join)
@pytest.mark.parametrize("name", ["hf conv1d", "conv transpose 1d, grouped", "experts (E, in, out)"])
def test_processes_write_the_same(
    name: str, route: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    kind, threads = TURNED[name], torch.get_num_threads()
    file, weight, bias = saved(kind, tmp_path)
    _, alone = convert(file, kind, *route)
    expected = [report.output.read_bytes() for report in alone]
    for report in alone:
        report.output.unlink()
    monkeypatch.setattr(running, "_WORTHWHILE", 0)
    torch.set_num_threads(2)
    try:
        _, several = convert(file, kind, *route)
    finally:
        torch.set_num_threads(threads)
    assert [report.output.read_bytes() for report in several] == expected
    for report in several:
        assert_holds(report.output, kind, weight, bias)


@pytest.mark.parametrize("route", ROUTES, ids="-".join)
def test_no_read_or_write_is_larger_than_a_task(
    route: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind("h.c_fc.weight", (48, 64), 1, bias=(64,))
    file, *_ = saved(kind, tmp_path)
    monkeypatch.setattr(mapping, "_BLOCK", 64)
    monkeypatch.setattr(running, "_BLOCKS", 4)
    monkeypatch.setattr(source, "_SUMMED", 64)
    sizes: list[int] = []
    part, write_part = Checkpoint.part, SafetensorsWriter.write_part

    def measured_part(*arguments: Any) -> Tensor:
        value = part(*arguments)
        sizes.append(value.numel())
        return value

    def measured_write(*arguments: Any) -> None:
        sizes.append(arguments[-1].numel())
        write_part(*arguments)

    monkeypatch.setattr(Checkpoint, "part", measured_part)
    monkeypatch.setattr(SafetensorsWriter, "write_part", measured_write)
    convert(file, kind, *route)
    assert len(sizes) > 48 * 64 // (4 * 64)
    assert max(sizes) <= 4 * 64


@pytest.mark.parametrize("unit", [0, 8, 21])
@pytest.mark.parametrize("to", ["sp", "wn"])
def test_one_unusable_lambda_keeps_the_whole_bias(unit: int, to: str, tmp_path: Path, small: None) -> None:
    kind = TURNED["hf conv1d"]
    weight, bias = kind.tensors(torch.float32)
    assert bias is not None
    bias[unit] = 2.0**30
    save_file({kind.key: weight, bias_key(kind.key): bias}, tmp_path / "model.safetensors")
    file, _ = convert(tmp_path / "model.safetensors", kind, "gmp")
    assert bits(load_file(file)[bias_key(kind.key)]) == bits(bias)
    file, _ = convert(file, kind, to)
    assert bits(load_file(file)[bias_key(kind.key)]) == bits(bias)


@pytest.mark.parametrize("to", ["sp", "wn"])
def test_a_trained_lambda_gives_a_rounded_16_bit_bias(to: str, tmp_path: Path, small: None) -> None:
    """r·λ is then no bfloat16: rounding it to one is no defect."""
    kind = TURNED["hf conv1d"]
    file, _, bias = saved(kind, tmp_path, torch.bfloat16)
    assert bias is not None
    file, _ = convert(file, kind, "gmp")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["h.c_fc.lambda_"] = (tensors["h.c_fc.lambda_"].double() * 1.0301).float()
    save_file(tensors, file, metadata)
    found = load_file(convert(file, kind, to)[0])[bias_key(kind.key)]
    product = tensors["h.c_fc.r"].double() * tensors["h.c_fc.lambda_"].double()
    assert bits(found) == bits(product.bfloat16())
    assert not torch.equal(found, bias)


def test_inexact_weights_are_named_by_their_index(tmp_path: Path, small: None) -> None:
    """bfloat16 [1e-5, −1] loses a bit: at the end of units 4 and 18, in different blocks and tasks."""
    weight = torch.eye(4, 22)
    for unit in (4, 18):
        weight[2:, unit] = torch.tensor([1e-5, -1.0])
    kind = Kind("h.c_fc.weight", (4, 22), 1, bias=(22,))
    save_file(
        {kind.key: weight.bfloat16(), bias_key(kind.key): torch.ones(22)}, tmp_path / "model.safetensors"
    )
    _, (report,) = convert(tmp_path / "model.safetensors", kind, "gmp")
    assert report.layers[0].inexact_at == [[2, 4], [2, 18]]


@pytest.mark.parametrize("to", ["gmp", "wn"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_weight_in_any_block_is_named(value: float, to: str, tmp_path: Path, small: None) -> None:
    kind = TURNED["conv transpose 1d, grouped"]
    for index in ((0, 0, 0), (2, 7, 1), (5, 3, 2)):
        weight, bias = kind.tensors(torch.float32)
        assert bias is not None
        weight[index] = value
        save_file({kind.key: weight, bias_key(kind.key): bias}, tmp_path / "model.safetensors")
        with pytest.raises(NonFiniteError, match=r"'u\.weight' holds NaN"):
            convert(tmp_path / "model.safetensors", kind, to)


@pytest.mark.parametrize("route", ROUTES, ids="-".join)
def test_another_memory_order_makes_no_difference(
    route: tuple[str, ...], tmp_path: Path, small: None
) -> None:
    kind = TURNED["hf conv1d"]
    file, weight, bias = saved(kind, tmp_path)
    expected, _ = convert(file, kind, *route)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "model.pt"
    torch.save({kind.key: weight.t().contiguous().t(), bias_key(kind.key): bias}, other)
    found, _ = convert(other, kind, *route)
    for key, value in load_file(expected).items():
        assert bits(load_file(found)[key]) == bits(value), key
