"""What a layer needs of a parameterization beyond the pure maps: differentiable composition, and where its tensors lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reparam.parameterizations import PARAMETERIZATIONS, TensorSpecs, WeightSpec


@dataclass
class Held:
    """One weight of a layer, and the bias that belongs to it, as the layer holds them.

    Attributes:
        spec: the plain weight and bias they stand for; ``spec.stored`` decides the exact zeros of angles,
            whatever dtype they are cast to later.
        dtype: of the composed weight and bias; follows ``.half()``, ``.double()`` and the like.
        bias_name: the attribute under which plain code reads the bias.
        bias_role: "bias" or "lambda_", None for a weight without.
        roles: of the tensors it is held in, the bias's among them.
    """

    spec: WeightSpec
    dtype: torch.dtype
    bias_name: str
    bias_role: str | None
    roles: tuple[str, ...]


class Form(ABC):
    """One parameterization as layers hold and train it."""

    #: as in :data:`reparam.parameterizations.PARAMETERIZATIONS`
    name: ClassVar[str]
    #: of the names of the layer classes
    prefix: ClassVar[str]
    #: roles never held below float32
    wide: ClassVar[frozenset[str]]
    #: the role of the scale, None where there is none to train
    scale: ClassVar[str | None] = None

    def place(self, weight: str, role: str) -> tuple[str | None, str]:
        """Submodule (None: the layer itself) and name of one tensor of the parameter ``weight``, as in a file."""
        return None, weight + role.removeprefix("weight")

    def tensors(self, spec: WeightSpec, bias_role: str | None) -> TensorSpecs:
        """Types and shapes by role."""
        return PARAMETERIZATIONS[self.name].tensors(spec, bias_role)

    def decompose(
        self, weight: Tensor, bias: Tensor | None, spec: WeightSpec, bias_role: str | None = None
    ) -> dict[str, Tensor]:
        """Tensors by role of a plain weight and bias.

        Raises:
            NonFiniteError: a weight is NaN or Inf.
        """
        return PARAMETERIZATIONS[self.name].decompose(weight, bias, spec, bias_role)

    def compose(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        """Plain weight and bias in float64 (the bias as stored where it is stored plain)."""
        return PARAMETERIZATIONS[self.name].compose(tensors, spec)

    @abstractmethod
    def weight(
        self, tensors: Mapping[str, Tensor], spec: WeightSpec, dtype: torch.dtype, outside: bool
    ) -> Tensor:
        """The weight, differentiable in its tensors; of unit rows if the scale stands ``outside``."""

    def bias(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, outside: bool) -> Tensor | None:
        """The bias, differentiable in its tensors."""
        bias = tensors.get("bias")
        return None if bias is None else bias.to(dtype)

    @abstractmethod
    def units_scale(self, tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor | None:
        """The scale of every unit, shape (units,); None where a scale is not one unit's alone."""
