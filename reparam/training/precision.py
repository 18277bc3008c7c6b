"""Where and in which element types a network is computed while it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.training.groups import parameter_kinds
from reparam.training.recipe import Recipe

#: kinds that stay wider than the rest of the network, where a file holds them so
_WIDE = frozenset({"theta", "r", "lambda_", "g"})
_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Device and element types of one run.

    Attributes:
        device: of parameters and batches.
        dtype: of parameters: float32 or float64.
        amp: of what autocast computes; None without mixed precision.
    """

    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> Precision:
        """The recipe's.

        Raises:
            ReparamError: fp16 without a GPU.
        """
        if recipe.amp == "fp16" and device.type != "cuda":
            raise ReparamError(f"--amp fp16 needs a GPU, this run is on {device.type}: use --amp bf16")
        amp = None if recipe.amp is None else _NARROW[recipe.amp]
        return cls(device, torch.float64 if recipe.dtype == "float64" else torch.float32, amp)

    def hold(self, model: nn.Module) -> None:
        """Bring a model's parameters and buffers here, in place; angles and scales in float64 stay so."""
        kinds = parameter_kinds(model)
        wide = {id(p) for name, p in model.named_parameters() if kinds[name] in _WIDE}

        def moved(tensor: Tensor) -> Tensor:
            keeps = id(tensor) in wide and tensor.element_size() > self.dtype.itemsize
            dtype = self.dtype if tensor.is_floating_point() and not keeps else tensor.dtype
            return tensor.to(self.device, dtype)

        model._apply(moved)  # type: ignore[no-untyped-call]  # Module.to, but for single tensors

    def place(self, tensor: Tensor) -> Tensor:
        """A batch's inputs or targets, here; integers stay integers."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)
