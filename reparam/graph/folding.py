"""Fold every parameterization back into plain weights.

conv1: GmPConv2d(r, theta)   --r·u(theta)-->   conv1: Conv2d(weight)
"""

from __future__ import annotations

from torch import nn

from reparam.graph.swap import replace_modules
from reparam.layers import Reparameterized


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every reparameterized layer is a plain layer of its original class again.

    Weights are composed in float64 and rounded once to the layer's dtype. The keys of the result's state_dict
    equal those of the model before it was reparameterized. ``model`` is not changed.
    """
    return replace_modules(
        model, lambda module: module.fold() if isinstance(module, Reparameterized) else None
    )
