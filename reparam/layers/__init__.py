"""Layers that hold a parameterization. To add one: its class, and its line in the table."""

from __future__ import annotations

from torch import nn

from reparam.layers.geometric import GeometricMixin, GmPConv2d, GmPLinear

__all__ = ["LAYERS", "GeometricMixin", "GmPConv2d", "GmPLinear"]

#: (parameterization, plain class) -> the layer that takes its place. The class is matched exactly: a subclass
#: may compute something else.
LAYERS: dict[tuple[str, type[nn.Module]], type[GeometricMixin]] = {
    ("gmp", nn.Linear): GmPLinear,
    ("gmp", nn.Conv2d): GmPConv2d,
}
