"""Unit norm: w = v/(‖v‖ + ε), the scale pushed into the next layer (references: the unit-norm blog).

Into unit norm there is no map of one layer's tensors: dividing w and b by ‖w‖ + ε changes what the layer computes unless
the consumers' weights are multiplied by it, and which layers those are is in the graph, not in the checkpoint. Back to a
plain weight there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reparam.errors import SelectionError
from reparam.parameterizations.base import Parameterization, TensorSpecs, WeightSpec
from reparam.parameterizations.weight_norm import norm_over

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8


class UnitNorm(Parameterization):
    """``weight_v``, the plain weight bit for bit before it was normalized, and ``bias``."""

    name = "unit"
    title = "unit norm"
    keeps_dtype = True
    needs_graph = (
        "unit norm pushes each layer's scale into the next layer, and tensors do not tell which layer that is: "
        "give the network with --arch"
    )

    def tensors(self, spec: WeightSpec, bias: str | None) -> TensorSpecs:
        specs: TensorSpecs = {"weight_v": (spec.dtype, spec.shape)}
        if bias is not None:
            specs["bias"] = spec.bias
        return specs

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        raise SelectionError(f"{self.needs_graph}")

    def compose(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        v = tensors["weight_v"]
        rows = spec.unit.to_rows(v.double())
        norm = norm_over(rows, (1,), v.dtype.itemsize == 8)
        return spec.unit.from_rows(rows / (norm + EPSILON), spec.shape), tensors.get("bias")
