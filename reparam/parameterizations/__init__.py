"""Parameterizations of a layer's weight. To add one: a file beside these, and its line in the table."""

from __future__ import annotations

from reparam.errors import SelectionError
from reparam.parameterizations.base import Parameterization, TensorSpecs, WeightSpec
from reparam.parameterizations.geometric import Geometric
from reparam.parameterizations.rows import UnitAxis
from reparam.parameterizations.standard import Standard
from reparam.parameterizations.unit_norm import UnitNorm
from reparam.parameterizations.weight_norm import WeightNorm

__all__ = [
    "PARAMETERIZATIONS",
    "Parameterization",
    "TensorSpecs",
    "UnitAxis",
    "WeightSpec",
    "parameterization",
]

PARAMETERIZATIONS: dict[str, Parameterization] = {
    p.name: p for p in (Standard(), WeightNorm(), Geometric(), UnitNorm())
}


def parameterization(name: str) -> Parameterization:
    """Look one up by its short name.

    Raises:
        SelectionError: there is none of that name.
    """
    try:
        return PARAMETERIZATIONS[name]
    except KeyError:
        raise SelectionError(
            f"unknown parameterization '{name}': one of {', '.join(PARAMETERIZATIONS)}"
        ) from None
