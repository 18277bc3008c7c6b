"""Unit norm: w = v/(‖v‖ + ε), the scale pushed into the next layer (references: Kingma & Salimans §2; unit-norm nets).

Not a map of one layer's tensors: dividing w and b by ‖w‖ changes what the layer computes unless the consumers'
weights are multiplied by it, and which layers those are is in the graph, not in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from reparam.errors import SelectionError
from reparam.parameterizations.base import Parameterization, TensorSpecs, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


class UnitNorm(Parameterization):
    """Listed so that asking for it says why a checkpoint alone does not suffice."""

    name = "unit"
    title = "unit norm"
    needs_graph = (
        "unit norm pushes each layer's scale into the next layer, and tensors do not tell which layer that is"
    )

    def tensors(self, spec: WeightSpec, bias: str | None) -> TensorSpecs:
        self._refuse()

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        self._refuse()

    def compose(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SelectionError(f"{self.needs_graph}")
