"""Layers that hold a parameterization.

To add a parameterization: its form, and its name in the table. To add a plain class: its line in kinds.
"""

from __future__ import annotations

from torch import nn

from reparam.layers.base import Reparameterized
from reparam.layers.caching import cached_weights
from reparam.layers.calibration import calibrate
from reparam.layers.gathering import gathered_gradients
from reparam.layers.geometric import GeometricMixin
from reparam.layers.initialization import (
    init_model,
    initialize_from_data,
    initialize_glorot,
    initialize_paper,
)
from reparam.layers.table import FORMS, LAYERS, layer_class

__all__ = [
    "FORMS",
    "LAYERS",
    "GeometricMixin",
    "GmPConv2d",
    "GmPLinear",
    "Reparameterized",
    "cached_weights",
    "calibrate",
    "gathered_gradients",
    "init_model",
    "initialize_from_data",
    "initialize_glorot",
    "initialize_paper",
    "layer_class",
]

globals().update({cls.__name__: cls for cls in LAYERS.values()})  # WNLinear and the rest
# Once more those that type checkers are to know.
GmPLinear = LAYERS["gmp", nn.Linear]
GmPConv2d = LAYERS["gmp", nn.Conv2d]
