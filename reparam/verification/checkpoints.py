"""A checkpoint against a checkpoint, by their tensors, whatever parameterizations hold them.

    ‖w' − w‖ / ‖w‖ ≤ bar        for every unit, w and w' composed in float64 and rounded to the coarser of the two types

| held | bar |
|---|---|
| plain on both sides | 0: bit for bit |
| the same plain type | 2e-7, where all derived tensors are float64 1e-12, at 16 bits 1e-6 (rare weights round otherwise) |
| different plain types | the rounding of the coarser one |

All other tensors must be the same bit for bit. What a wrapper left before every key of one file ("module.") is no
difference. A layer is read in blocks of units: memory does not grow with the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from reparam.checkpoint.cutting import Block
from reparam.checkpoint.layers import Layer, find_layers
from reparam.checkpoint.reading import Checkpoint, open_checkpoint
from reparam.checkpoint.selection import Selection, without_effect
from reparam.checkpoint.source import Source
from reparam.dtypes import torch_dtype
from reparam.graph.arch import wrapper_prefix
from reparam.parameterizations import parameterization
from reparam.verification.report import ROWS, Check, Report
from reparam.verification.weights import same_bits

_BLOCK = 1 << 18
_ROW = {"F64": 1e-12, "F32": 2e-7}
_SHORT_ROW = 1e-6
_ROUNDING = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_COARSE = ("F64", "F32", "F16", "BF16")
#: batch counters, which nothing in evaluation is computed with
_COUNTER = "num_batches_tracked"


def verify_checkpoints(reference: Path, candidate: Path, axes: Mapping[str, int] | None = None) -> Report:
    """Whether two checkpoints hold the same weights.

    Args:
        reference, candidate: files, indices of shards or folders, in any parameterization.
        axes: unit axes by glob, where shapes do not tell them.

    Returns:
        One check a layer, and one for all other tensors.

    Raises:
        CheckpointError: one cannot be read.
        SelectionError: a glob of ``axes`` matches no layer.
    """
    opened = open_checkpoint(reference), open_checkpoint(candidate)
    prefixes = (
        wrapper_prefix(opened[0].tensors, opened[1].tensors),
        wrapper_prefix(opened[1].tensors, opened[0].tensors),
    )
    known = [{layer.key: layer.spec.unit.axis for layer in find_layers(c, axes).layers} for c in opened]
    # What a file records of its units settles what the other's shapes leave open.
    told = [
        {key.removeprefix(own): axis for key, axis in axis_of.items() if key in checkpoint.records}
        for checkpoint, axis_of, own in zip(opened, known, prefixes, strict=True)
    ]
    theirs = [
        {prefix + key: axis for key, axis in other.items()}
        for prefix, other in zip(prefixes, reversed(told), strict=True)
    ]
    first, second = (
        find_layers(c, other | dict(axes or {})) for c, other in zip(opened, theirs, strict=True)
    )
    Selection().check((*first.layers, *second.layers), tuple(axes or ()))
    idle = [
        without_effect(axes or {}, contents.layers, find_layers(c, other).layers)
        for contents, c, other in zip((first, second), opened, theirs, strict=True)
    ]
    layers = (
        {layer.key.removeprefix(prefixes[0]): layer for layer in first.layers},
        {layer.key.removeprefix(prefixes[1]): layer for layer in second.layers},
    )
    checks = [_compare(opened, layers[0][key], layers[1][key]) for key in layers[0] if key in layers[1]]
    others = set(_free(layers[0], layers[1], first.others)), set(_free(layers[1], layers[0], second.others))
    checks += _other_tensors(opened, others, prefixes)
    first_wrong = next((c.where.split("`")[1] for c in checks if not c.passed and c.where), None)
    notes = ["by tensors alone: what the network does with them is not compared"]
    notes += [
        f"`{prefix}` stands before every name in {path}: left out"
        for prefix, path in zip(prefixes, (reference, candidate), strict=True)
        if prefix
    ]
    notes += [line for pattern, line in idle[0].items() if pattern in idle[1]]
    return Report(tuple(checks), tuple(notes), first_wrong)


def _free(own: Mapping[str, Layer], other: Mapping[str, Layer], rest: Mapping[str, str]) -> Iterator[str]:
    """Keys of one file that are compared as they are: no part of a layer that both have."""
    yield from rest
    for key, layer in own.items():
        if key not in other:
            yield from layer.tensors.values()


def _compare(opened: tuple[Checkpoint, Checkpoint], a: Layer, b: Layer) -> Check:
    """One layer of both files."""
    fault = _mismatch(opened, a, b)
    if fault is not None:
        return _failed(a.key, fault)
    bar, dtype = _bar(a, b)
    worst, worst_bias, largest, inexact = 0.0, 0.0, 0.0, 0
    sources = [_source(c, layer) for c, layer in zip(opened, (a, b), strict=True)]
    for block in Block.whole(a.spec).by_units(_BLOCK):
        (weight, bias), (other, other_bias) = (
            parameterization(layer.kind).compose(source(block), block.of(layer.spec))
            for layer, source in zip((a, b), sources, strict=True)
        )
        want, have = weight.to(dtype).double(), other.to(dtype).double()
        if not bool(torch.isfinite(want).all()) or not bool(torch.isfinite(have).all()):
            return _failed(a.key, "NaN or Inf")
        inexact += int((want != have).sum())
        spec = block.of(a.spec)
        apart, size = (torch.linalg.vector_norm(spec.unit.to_rows(x), dim=1) for x in (have - want, want))
        worst = max(worst, _share(apart, size))
        largest = max(largest, float((have - want).abs().max()) if want.numel() else 0.0)
        if bias is not None and other_bias is not None:
            want, have = bias.to(dtype).double(), other_bias.to(dtype).double()
            worst_bias = max(worst_bias, _share((have - want).abs(), want.abs()))
    error = max(worst, worst_bias)
    where = f"`{a.key}`: {a.kind} and {b.kind}, {inexact} weights not bit for bit"
    if worst_bias > bar:
        where += f", the bias is off by {worst_bias:.1e}"
    # Infinite has no place in JSON: more than all of it is as wrong.
    return Check(ROWS, error <= bar, largest, min(error, 1e308), tolerance=bar, where=where, proof="weights")


def _share(apart: Tensor, size: Tensor) -> float:
    """Largest part of ``size`` that ``apart`` is; infinite where there is only a difference."""
    if not apart.numel():
        return 0.0
    return float(torch.where(apart == 0, 0.0, apart / size).max())


def _mismatch(opened: tuple[Checkpoint, Checkpoint], a: Layer, b: Layer) -> str | None:
    """Why two layers cannot hold the same weight."""
    if a.spec.shape != b.spec.shape:
        return f"{list(b.spec.shape)}, should be {list(a.spec.shape)}"
    if a.spec.unit != b.spec.unit:
        return f"units on axis {b.spec.unit.axis}, should be {a.spec.unit.axis} (--axis says which)"
    if (a.bias is None) != (b.bias is None):
        return "it has a bias in one of the two files"
    records = [c.records.get(layer.key) for c, layer in zip(opened, (a, b), strict=True)]
    done = [(r.mean, r.batch_norms) if r is not None else (None, ()) for r in records]
    if done[0] != done[1]:
        told = next(r.rewritten for r in records if r is not None and r.rewritten)
        return f"{told} in one of the two files: tensors alone do not tell whether they agree, --arch does"
    return None


def _bar(a: Layer, b: Layer) -> tuple[float, torch.dtype]:
    """The largest row error that is none, and the type in which weights are compared."""
    coarse = max(a.spec.dtype, b.spec.dtype, key=_COARSE.index)
    if a.kind == b.kind == "sp":
        return 0.0, torch_dtype(coarse)
    if a.spec.dtype != b.spec.dtype:
        return max(_ROUNDING[coarse], _ROW["F32"]), torch_dtype(coarse)
    derived = [layer.spec.stored for layer in (a, b) if layer.kind != "sp"]
    row = max(_ROW[stored] for stored in derived)
    if coarse in ("F16", "BF16"):
        row = max(row, _SHORT_ROW)
    return row * len(derived), torch_dtype(coarse)


def _source(checkpoint: Checkpoint, layer: Layer) -> Source:
    whole = Block.whole(layer.spec)
    return Source(checkpoint, layer, whole, {0, layer.spec.unit.axis}, {})


def _other_tensors(
    opened: tuple[Checkpoint, Checkpoint], others: tuple[set[str], set[str]], prefixes: tuple[str, str]
) -> list[Check]:
    """What is no layer on both sides, bit for bit."""
    checks = []
    compared = 0
    names = {key.removeprefix(prefixes[1]): key for key in others[1]}
    for key in opened[0].tensors:
        if key not in others[0]:
            continue
        name = names.pop(key.removeprefix(prefixes[0]), None)
        if name is None:
            if not key.endswith(_COUNTER):
                checks.append(_failed(key, "not in the candidate"))
            continue
        a, b = opened[0].tensor(key), opened[1].tensor(name)
        compared += a.numel()
        if a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point():
            b = b.to(a.dtype) if a.dtype.itemsize < b.dtype.itemsize else b
            a = a.to(b.dtype)
        if not same_bits(a, b):
            told = (
                f"{b.dtype} {list(b.shape)}" if a.shape != b.shape or a.dtype != b.dtype else "other values"
            )
            checks.append(_failed(key, told))
    checks += [
        _failed(key, "not in the reference") for key in sorted(names.values()) if not key.endswith(_COUNTER)
    ]
    if not checks and compared:
        where = f"{compared:,} values that belong to no layer, bit for bit"
        checks.append(Check("other tensors", True, 0.0, where=where, proof="weights"))
    return checks


def _failed(key: str, why: str) -> Check:
    return Check("tensors", False, where=f"`{key}`: {why}", proof="weights")
