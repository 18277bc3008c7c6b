"""Deployment in half precision: all floating tensors of the model, its floating inputs and so its outputs, in 16 bits.

What a forward pass computes in a type of its own (``x.float()``) stays in it. Nothing is kept back in float32: what
overflows or needs the precision shows in the comparison with the original, and belongs into the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from reparam.errors import NonFiniteError, ReparamError
from reparam.graph.inputs import InputSpec

#: as ``--dtype`` names them
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: the first operator set whose convolutions and recurrent layers take bfloat16
_BFLOAT16_OPSET = 22


def cast_model(model: nn.Module, dtype: str) -> nn.Module:
    """A copy of ``model`` cast to "fp16" or "bf16"; its integer tensors stay as they are.

    Raises:
        ReparamError: another type.
        NonFiniteError: a value is too large for it.
    """
    cast = copy.deepcopy(model).to(_dtype(dtype))
    before = model.state_dict()
    for key, x in cast.state_dict().items():
        if x.is_floating_point() and not torch.isfinite(x).all() and torch.isfinite(before[key]).all():
            largest = float(before[key].abs().max())
            raise NonFiniteError(
                f"`{key}` holds {largest:.3g}, too large for --dtype {dtype}: try bf16 or none"
            )
    return cast


def cast_specs(specs: Sequence[InputSpec], dtype: str) -> tuple[InputSpec, ...]:
    """The inputs of the cast model: floating ones in its type."""
    name = str(_dtype(dtype)).removeprefix("torch.")
    return tuple(replace(spec, dtype=name) if spec.is_float else spec for spec in specs)


def opset_for(dtype: str | None, opset: int | None) -> int | None:
    """The operator set to export to, None for the exporter's default.

    Raises:
        ReparamError: one without the type.
    """
    if dtype != "bf16":
        return opset
    if opset is not None and opset < _BFLOAT16_OPSET:
        raise ReparamError(
            f"--opset {opset}: has no convolutions in bfloat16: leave it out or give {_BFLOAT16_OPSET}"
        )
    return opset or _BFLOAT16_OPSET


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ReparamError(f"--dtype {name}: one of {', '.join(DTYPES)}; without, the model's own")
    return DTYPES[name]
