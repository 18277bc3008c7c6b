"""What the tests of the rewriting rules share: networks with values nothing is blind to, and how far outputs differ."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: of the output's scale, in float64
EXACT = 1e-12


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode: every parameter normal, batch norms with statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if parameter.dim() > 1:
                parameter /= parameter[0].numel() ** 0.5
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 3 + 0.1)
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal float64 input of nonzero mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5


def outputs(model: nn.Module, *x: Tensor, seed: int = 3) -> list[Tensor]:
    """Every tensor the model returns for copies of its inputs, dropout drawn under a seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        found: Any = model(*(tensor.clone() for tensor in x))
    return [found] if isinstance(found, Tensor) else list(found)


def difference(found: nn.Module, expected: nn.Module, *x: Tensor) -> float:
    """The largest difference of the outputs, in units of the expected output's largest value."""
    pairs = zip(outputs(found, *x), outputs(expected, *x), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def copied(model: nn.Module) -> nn.Module:
    """A private copy, as a rule takes it."""
    return copy.deepcopy(model)
