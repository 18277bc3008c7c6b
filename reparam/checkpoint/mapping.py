"""One layer from its source tensors to its target tensors: rows stream through in blocks.

A block of rows is read, composed, decomposed, decoded again for comparison, and written; everything between source
and target is float64, only what is written is rounded. Memory is a few blocks, whatever the layer's size. Blocks run
on a few threads, for torch releases the interpreter lock. (torch's own threads would split every operation instead and
wait for one another in a spin after each: on cores that something else is using too, that can take ten times as long.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reparam.checkpoint.layers import Layer
from reparam.checkpoint.metadata import LayerRecord
from reparam.dtypes import torch_dtype
from reparam.errors import CheckFailedError, NonFiniteError
from reparam.parameterizations import WeightSpec, parameterization

# Weights of one block. Smaller ones fit a core's cache better, but threads then queue for the interpreter lock between
# many short operations; larger ones gain nothing more.
_BLOCK = 1 << 18
#: Largest error of a row, ‖Δw‖/‖w‖, that a conversion may make, by the type of the plain weight. More is a defect.
ROW_ERROR_BAR = {"F64": 1e-12, "F32": 2e-7, "F16": 1e-6, "BF16": 1e-6}
_NAMED = 16
# Float32 holds neither a smaller norm nor its weights to full precision: errors of such rows are relative to it.
_SMALLEST_NORMAL = 2.0**-126
# Just below the 32 MB up to which glibc adapts.
_KEPT = (32 << 20) - 8192

Tensors = dict[str, Tensor]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Block:
    """``count`` of the ``leading`` equal slices of a layer's tensors, from ``start``."""

    start: int
    count: int
    leading: int

    def rows(self, extent: int) -> tuple[int, int]:
        """First and number of this block's rows in a tensor whose first axis has ``extent``."""
        share = extent // self.leading
        return self.start * share, self.count * share

    def of(self, spec: WeightSpec) -> WeightSpec:
        return spec if self.count == self.leading else spec.block(self.count)


Read = Callable[[Block], Tensors]
Write = Callable[[Block, Tensors], None]


@dataclass(frozen=True)
class Fidelity:
    """How exactly tensors that were written give the source's weights back, both rounded to the plain dtype.

    Attributes:
        weights, rows: how many were compared.
        inexact: weights that are not bit for bit the same.
        max_row_error: largest ‖Δw‖/‖w‖ of a unit.
        where: flat positions (C order) of the first inexact weights in the plain weight.
        bias_inexact: biases that are not bit for bit the same.
    """

    weights: int = 0
    rows: int = 0
    inexact: int = 0
    max_row_error: float = 0.0
    where: tuple[int, ...] = ()
    bias_inexact: int = 0

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.weights + other.weights,
            self.rows + other.rows,
            self.inexact + other.inexact,
            max(self.max_row_error, other.max_row_error),
            (self.where + other.where)[:_NAMED],
            self.bias_inexact + other.bias_inexact,
        )


@contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for blocks, each with torch's own threading off; restored afterwards."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def _keep_freed_memory() -> None:
    """Have glibc hand a block's buffers out again, instead of giving their pages back to the system after every use.

    Freeing one large buffer raises its thresholds for that to about the buffer's size, and touches none of its pages.
    Elsewhere this does nothing.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


def blocks(spec: WeightSpec, divisible: bool) -> list[Block]:
    """Cut a layer into blocks of about ``_BLOCK`` weights, or into one where its tensors cannot be cut alike."""
    leading = spec.leading
    if not divisible:
        return [Block(0, leading, leading)]
    step = max(1, _BLOCK * leading // max(1, math.prod(spec.shape)))
    return [Block(start, min(step, leading - start), leading) for start in range(0, leading, step)]


def map_layer(
    layer: Layer, record: LayerRecord, parts: list[Block], read: Read, write: Write, pool: ThreadPoolExecutor
) -> Fidelity:
    """Decompose a layer into the parameterization of ``record``, block by block.

    Args:
        layer: how the source is held.
        record: how the result is to be held.
        parts: from :func:`blocks`.
        read: gives a block's source tensors by role.
        write: takes a block's target tensors by role.
        pool: from :func:`worker_threads`.

    Raises:
        NonFiniteError: a weight or bias is NaN or Inf.
        CheckFailedError: what was computed does not give the source back within the bar.
    """
    source, target = parameterization(layer.kind), parameterization(record.kind)

    def one(block: Block) -> Fidelity:
        weight, bias = source.compose(_finite(read(block)), block.of(layer.spec))
        spec = block.of(record.spec)
        tensors = target.decompose(weight, bias, spec, record.bias)
        write(block, tensors)
        return (
            Fidelity() if record.kind == "sp" else _compare(weight, bias, tensors, record.kind, spec, block)
        )

    fidelity = sum(pool.map(one, parts), Fidelity())
    bar = max(ROW_ERROR_BAR[record.spec.dtype], ROW_ERROR_BAR[record.spec.stored])
    if not fidelity.max_row_error <= bar:  # NaN is no pass
        raise CheckFailedError(
            f"'{layer.key}' came back with a row error of {fidelity.max_row_error:.1e}, the bar is {bar:.0e};"
            " nothing was written: please report this"
        )
    return fidelity


def bias_role(
    layer: Layer, record: LayerRecord, parts: list[Block], read: Read, pool: ThreadPoolExecutor
) -> str:
    """Under which role the whole layer's bias is to be kept: decided by its values, before anything is written."""
    source, target = parameterization(layer.kind), parameterization(record.kind)

    def one(block: Block) -> str:
        weight, bias = source.compose(_finite(read(block)), block.of(layer.spec))
        assert bias is not None
        return target.bias_role(weight, bias, block.of(record.spec))

    roles = set(pool.map(one, parts))
    return roles.pop() if len(roles) == 1 else "bias"


def _finite(tensors: Tensors) -> Tensors:
    """Check all but the plain weight, whose NaN or Inf shows in its norm, for which every map looks."""
    for role in ("bias", "lambda_", "r", "weight_g", "theta"):
        if role in tensors and not _all_finite(tensors[role]):
            raise NonFiniteError(f"NaN or Inf in its {role}")
    return tensors


def _all_finite(tensor: Tensor) -> bool:
    """Whether the sum is finite; only where it is not, float64 tells an overflow from a NaN or Inf."""
    return math.isfinite(float(tensor.sum())) or math.isfinite(float(tensor.sum(dtype=torch.float64)))


def _compare(
    weight: Tensor,
    bias: Tensor | None,
    tensors: Mapping[str, Tensor],
    kind: str,
    spec: WeightSpec,
    block: Block,
) -> Fidelity:
    """Decode ``tensors`` again and hold them against what they were made of."""
    again, bias_again = parameterization(kind).compose(tensors, spec)
    dtype = torch_dtype(spec.dtype)
    want, have = weight.to(dtype), again.to(dtype)
    unequal = _unequal(want, have)
    inexact, error = int(np.count_nonzero(unequal)), 0.0
    where: tuple[int, ...] = ()
    if inexact:
        if dtype.itemsize == 2:  # differences of 16-bit numbers are exact in float32
            want, have = want.float(), have.float()
        if bool((unequal & (want.numpy() == 0)).any()):
            raise CheckFailedError("an exact zero did not survive; nothing was written: please report this")
        error = _row_error(spec.unit.to_rows(have - want), spec.unit.to_rows(again))
        first = block.start * (weight.numel() // block.count)
        where = tuple(first + i for i in _first(unequal))
    bias_inexact = 0
    if bias is not None and bias_again is not None:
        assert spec.bias_dtype is not None
        bias_dtype = torch_dtype(spec.bias_dtype)
        bias_inexact = int((bias.to(bias_dtype) != bias_again.to(bias_dtype)).sum())
    return Fidelity(weight.numel(), spec.units, inexact, error, where, bias_inexact)


def _unequal(want: Tensor, have: Tensor) -> Mask:
    """Where two tensors of one type differ; 0.0 equals −0.0. numpy compares several times faster than torch."""
    if want.dtype.itemsize == 2:
        # Numbers of the same bits are equal, and nearly always all are: there is no need to widen them.
        unequal: Mask = np.not_equal(want.view(torch.int16).numpy(), have.view(torch.int16).numpy())
        if not unequal.any():
            return unequal
        want, have = want.float(), have.float()
    different: Mask = np.not_equal(want.numpy(), have.numpy())
    return different


def _first(mask: Mask) -> list[int]:
    """Flat positions of the first few set elements, looking no further than it must."""
    flat, found = mask.reshape(-1), []
    for start in range(0, flat.size, 4096):
        found += [start + int(i) for i in np.flatnonzero(flat[start : start + 4096])[:_NAMED]]
        if len(found) >= _NAMED:
            break
    return found[:_NAMED]


def _row_error(difference: Tensor, again: Tensor) -> float:
    """Largest ‖difference‖/‖again‖ of a row, which is ‖Δw‖/‖w‖ up to its own size; none for an exact row."""
    error = torch.linalg.vector_norm(difference.double(), dim=1)
    norm = torch.linalg.vector_norm(again, dim=1).clamp_min(_SMALLEST_NORMAL)
    return float(torch.where(error == 0, 0.0, error / norm).max())
