"""One layer from its source tensors to its target tensors: rows stream through in blocks that stay in cache.

A block of rows is read, composed, decomposed, decoded again for comparison, and written; everything between source
and target is float64, only what is written is rounded. Memory is a few blocks, whatever the layer's size. Blocks run
on a few threads: torch releases the interpreter lock, and a block's many small operations share a cache better than
they share cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam.checkpoint.layers import Layer
from reparam.checkpoint.metadata import LayerRecord
from reparam.dtypes import torch_dtype
from reparam.errors import CheckFailedError, NonFiniteError
from reparam.parameterizations import WeightSpec, parameterization

# Weights of one block: half a dozen float64 temporaries of it fit a core's cache.
_BLOCK = 1 << 16
#: Largest error of a row, ‖Δw‖/‖w‖, that a conversion may make, by the type of the plain weight. More is a defect.
ROW_ERROR_BAR = {"F64": 1e-12, "F32": 2e-7, "F16": 1e-6, "BF16": 1e-6}
_NAMED = 5

Tensors = dict[str, Tensor]


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
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


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
    bar = ROW_ERROR_BAR[record.spec.dtype]
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
    """Check the small tensors; a weight's NaN or Inf shows in its norm, for which every map looks."""
    for role in ("bias", "lambda_", "r", "weight_g", "theta"):
        if role in tensors and not bool(torch.isfinite(tensors[role].sum(dtype=torch.float64))):
            raise NonFiniteError(f"NaN or Inf in its {role}")
    return tensors


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
    # Differences of 16-bit numbers are exact in float32, those of float32 neighbours in float32.
    difference = have.sub(want) if spec.dtype in ("F32", "F64") else have.float().sub_(want.float())
    inexact, error = int(torch.count_nonzero(difference)), 0.0
    where: tuple[int, ...] = ()
    if inexact:
        if bool(((want == 0) & (have != 0)).any()):
            raise CheckFailedError("an exact zero did not survive; nothing was written: please report this")
        error = _row_error(spec.unit.to_rows(difference), spec.unit.to_rows(want))
        first = block.start * (weight.numel() // block.count)
        where = tuple(first + int(i) for i in _first_nonzero(difference))
    bias_inexact = 0
    if bias is not None and bias_again is not None:
        assert spec.bias_dtype is not None
        bias_dtype = torch_dtype(spec.bias_dtype)
        bias_inexact = int((bias.to(bias_dtype) != bias_again.to(bias_dtype)).sum())
    return Fidelity(weight.numel(), spec.units, inexact, error, where, bias_inexact)


def _first_nonzero(difference: Tensor) -> list[int]:
    """Positions of the first few nonzero elements, looking no further than it must."""
    flat, found = difference.reshape(-1), []
    for start in range(0, flat.numel(), 4096):
        found += [start + int(i) for i in flat[start : start + 4096].nonzero()[:_NAMED, 0]]
        if len(found) >= _NAMED:
            break
    return found[:_NAMED]


def _row_error(difference: Tensor, want: Tensor) -> float:
    """Largest ‖difference‖/‖want‖ of a row; a row of zeros must come back as zeros."""
    error = torch.linalg.vector_norm(difference.double(), dim=1)
    norm = torch.linalg.vector_norm(want.double(), dim=1)
    return float(torch.where(error == 0, 0.0, error / norm).max())
