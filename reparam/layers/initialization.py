"""Values to start training from: the paper's, and data-dependent ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.layers.base import Reparameterized


@torch.no_grad()
def initialize_paper(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """r = 1, u uniform on the sphere, λ = 0 in every reparameterized layer, in place (Chen & Ge §3.3).

    In weight normalization the same function: g = 1, v uniform on the sphere, b = 0. Running means start at zero.
    None of it depends on the size of the layer.
    """
    for layer in _layers(model).values():
        for name, held in layer.held.items():
            rows = torch.randn(held.spec.units, held.spec.fan_in, generator=generator, dtype=torch.float64)
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            bias = None if held.spec.bias_shape is None else torch.zeros(held.spec.bias_shape)
            tensors = layer.tensors(name)
            device = next(iter(tensors.values())).device
            weight = held.spec.unit.from_rows(rows, held.spec.shape).to(device)
            layer.assign(weight, None if bias is None else bias.to(device), name)
            # Not in a weight normalization whose norms run over other axes than a unit's.
            scale = layer.form.units_scale(tensors, held.spec)
            if scale is not None:
                scale.fill_(1.0)
        if layer.mean is not None:
            layer.get_buffer(layer.mean.buffer).zero_()


@torch.no_grad()
def initialize_from_data(model: nn.Module, *inputs: Any) -> list[str]:
    """Zero mean and unit variance of every pre-activation on one batch, in place (Salimans & Kingma §3).

    One forward pass: each reparameterized layer, when it is reached, divides its scale by the deviation of its
    pre-activations and moves its bias, and hands on what it then computes. Directions are kept. A unit that is
    constant on the batch keeps its scale; a layer without bias keeps its mean.

    Args:
        model: in the mode it is going to be trained in.
        inputs: of its forward pass; a few hundred samples.

    Returns:
        The names of the layers it reached. Recurrent and attention projections are left as they are.

    Raises:
        ReparamError: a layer in unit norm, which has no scale.
    """
    reached: list[str] = []
    handles = []
    for name, layer in _layers(model).items():
        if list(layer.held) != ["weight"]:
            continue
        if layer.form.name == "unit":
            raise ReparamError(f"`{name}` is in unit norm: it has no scale to initialize")

        def hook(layer: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor | None:
            if name in reached:
                return None
            reached.append(name)
            assert isinstance(layer, Reparameterized)
            return _standardize(layer, output)

        handles.append(layer.register_forward_hook(hook, prepend=True))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _standardize(layer: Reparameterized, output: Tensor) -> Tensor:
    """Rescale and shift the layer's units; what it would now have computed instead of ``output``."""
    channel = layer.kind.channel % output.dim()
    axes = [axis for axis in range(output.dim()) if axis != channel]
    deviation, mean = torch.std_mean(output.double(), dim=axes, correction=0)
    factor = torch.where(deviation > 0, 1 / deviation, 1.0)
    held, tensors = layer.held["weight"], layer.tensors()
    if held.bias_role is None:
        mean = torch.zeros_like(mean)
    scale = layer.form.units_scale(tensors, held.spec)
    if scale is None:
        weight, bias = layer.form.compose(tensors, held.spec)
        rows = held.spec.unit.to_rows(weight) * factor[:, None]
        bias = None if bias is None else (bias.double() - mean) * factor
        layer.assign(held.spec.unit.from_rows(rows, held.spec.shape), bias)
    else:
        radius = scale.double()
        if held.bias_role == "bias":
            tensors["bias"].copy_((tensors["bias"].double() - mean) * factor)
        elif held.bias_role == "lambda_":
            step = mean if layer.scale_outside else torch.where(mean == 0, 0.0, mean / radius)
            tensors["lambda_"].copy_(tensors["lambda_"].double() - step)
        # Outside, the pre-activation is that of unit rows, and what r was does not enter.
        scale.copy_(factor if layer.scale_outside else radius * factor)
    shape = [-1 if axis == channel else 1 for axis in range(output.dim())]
    changed = output - mean.reshape(shape)
    return (changed if layer.scale_outside else changed * factor.reshape(shape)).to(output.dtype)


def _layers(model: nn.Module) -> dict[str, Reparameterized]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Reparameterized)}
