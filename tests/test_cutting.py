"""Where the blocks of a layer lie: against loops over every element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from column_cases import TURNED
from layer_kinds import KINDS, Kind, rows_by_loops

from reparam.checkpoint.cutting import Block, runs, within
from reparam.parameterizations import UnitAxis, WeightSpec


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
@pytest.mark.parametrize("kind", [*KINDS.values(), *TURNED.values()], ids=[*KINDS, *TURNED])
def test_blocks_tile_the_layer(kind: Kind, size: int) -> None:
    """Every weight and every unit is in one block, the weights of a unit where its r and theta are."""
    spec = WeightSpec(kind.shape, "F32", UnitAxis(kind.axis, kind.groups))
    numbered = torch.arange(math.prod(kind.shape)).reshape(kind.shape)
    rows = rows_by_loops(numbered, kind.axis, kind.groups)
    for cut in (Block.by_units, Block.by_groups, Block.by_rows):
        seen: list[int] = []
        units: list[int] = []
        for block in cut(Block.whole(spec), size):
            inside = numbered[tuple(slice(*edge) for edge in block.box)]
            seen += inside.reshape(-1).tolist()
            if block.units is not None:
                units += range(*block.units)
            if not block.across:
                assert block.units is not None
                own = rows[slice(*block.units)]
                assert torch.equal(block.of(spec).unit.to_rows(inside), own)
        assert sorted(seen) == list(range(len(seen))) == numbered.reshape(-1).tolist()
        assert units == list(range(len(rows)))


def boxes(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    edges = [[(a, b) for a in range(e) for b in range(a + 1, e + 1)] for e in shape]
    return itertools.product(*edges)


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_runs_are_the_elements_of_a_box(shape: tuple[int, ...]) -> None:
    numbered = torch.arange(math.prod(shape)).reshape(shape)
    for box in boxes(shape):
        starts, length = runs(shape, box)
        expected = numbered[tuple(slice(*edge) for edge in box)]
        assert [start + i for start in starts for i in range(length)] == expected.reshape(-1).tolist()
        if shape:
            outer = ((0, shape[0]), *box[1:])
            held = numbered[tuple(slice(*edge) for edge in outer)]
            assert torch.equal(held[within(box, outer)], expected)
