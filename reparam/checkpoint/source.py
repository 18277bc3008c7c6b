"""A layer's tensors as a file holds them, read block by block for one task."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from reparam.checkpoint.cutting import Block, Part, Range, within
from reparam.checkpoint.layers import Layer
from reparam.checkpoint.reading import Checkpoint
from reparam.dtypes import torch_dtype
from reparam.parameterizations.weight_norm import norm_axes, norm_over

# Weights of which a norm over more than a block is summed at once.
_SUMMED = 1 << 18


class Source:
    """Gives the tensors of any block within one block of a layer.

    What does not lie in the file in one piece, columns or a tensor in another memory order, is read once for all of the
    outer block: many short reads cost more than the memory of few long ones.

    Args:
        checkpoint, layer: what to read.
        outer: in which all blocks lie.
        axes: of the weight along which the layer is cut into blocks.
        norms: by layer key, WN's norms over what is cut, which need a pass over v of their own; filled here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: Layer,
        outer: Block,
        axes: Collection[int],
        norms: dict[str, Tensor],
    ) -> None:
        self._checkpoint, self._layer, self._outer = checkpoint, layer, outer
        self._kept: dict[str, Tensor] = {}
        self._norm: Tensor | None = None
        if layer.kind == "wn":
            v, g = (checkpoint.tensors[layer.tensors[role]].shape for role in ("weight_v", "weight_g"))
            over = norm_axes(v, g)
            if not set(over).isdisjoint(axes):
                if layer.key not in norms:
                    norms[layer.key] = self._norms(over)
                self._norm = norms[layer.key]

    def __call__(self, block: Block) -> dict[str, Tensor]:
        tensors = {}
        for role, key in self._layer.tensors.items():
            part = block.part(role, self._checkpoint.tensors[key].shape)
            if part is not None:
                tensors[role] = self._read(role, key, part)
        if self._norm is not None:
            shape = tuple(self._norm.shape)
            tensors["norm"] = self._norm[tuple(slice(*edge) for edge in block.ranges(shape))]
        return tensors

    def _read(self, role: str, key: str, part: Part) -> Tensor:
        shape, box = part
        info = self._checkpoint.tensors[key]
        if info.stride is None and not _scattered(shape, box):
            return self._checkpoint.part(key, shape, box)
        outer = self._outer.part(role, info.shape)
        assert outer is not None
        if role not in self._kept:
            self._kept[role] = self._checkpoint.part(key, *outer)
        return self._kept[role][within(box, outer[1])]

    def _norms(self, over: tuple[int, ...]) -> Tensor:
        """float64 norms of the whole v, shaped like g with all axes; the same however the layer is cut."""
        key = self._layer.tensors["weight_v"]
        info = self._checkpoint.tensors[key]
        v, g = info.shape, self._checkpoint.tensors[self._layer.tensors["weight_g"]].shape
        norms = torch.zeros(g or [1] * len(v), dtype=torch.float64)
        for part in Block.whole(self._layer.spec).by_rows(_SUMMED):
            norm = norm_over(self._read("weight_v", key, (v, part.box)).double(), over, info.dtype == "F64")
            # In place: results kept one by one would keep the freed memory between them in pieces. Not a sum of squares,
            # which could over- or underflow.
            total = norms[tuple(slice(*edge) for edge in part.ranges(tuple(norms.shape)))]
            torch.hypot(total, norm, out=total)
        return norms


def divisible(checkpoint: Checkpoint, layer: Layer) -> bool:
    """Whether parts of a layer can be read alone; a tensor in another memory order is read whole, so only once."""
    return all(checkpoint.tensors[key].stride is None for key in layer.tensors.values())


def whereabouts(checkpoint: Checkpoint, layer: Layer) -> str:
    """How many values of a layer's first tensor with any are NaN or Inf, and where the first one is; else empty."""
    for key in layer.tensors.values():
        info, at, count, first = checkpoint.tensors[key], 0, 0, 0
        for block in checkpoint.blocks(key) if info.numel else ():
            values = torch.frombuffer(bytearray(block), dtype=torch_dtype(info.dtype))
            bad = values.isfinite().logical_not_().nonzero()
            first = at + int(bad[0]) if len(bad) and not count else first
            at, count = at + len(values), count + len(bad)
        if count:
            place = [int(i) for i in np.unravel_index(first, info.shape)]
            return f" ({count:,} {'value' if count == 1 else 'values'}, the first at {key}{place})"
    return ""


def _scattered(shape: Sequence[int], box: Sequence[Range]) -> bool:
    """Whether a box is cut along another axis than the first."""
    return any(edge != (0, extent) for edge, extent in zip(box[1:], shape[1:], strict=True))
