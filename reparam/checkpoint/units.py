"""Which axis of a weight counts its output units, as far as a checkpoint can tell.

The bias has one element a unit, which decides most cases. Where two answers fit (a square HF ``Conv1D``, a transposed
convolution as wide as it is deep) a config.json or ``--axis`` decides; otherwise axis 0 is assumed and the report says
so. Any answer converts back exactly: the axis says which rows are units, not what the layer computes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reparam.checkpoint import dialects
from reparam.errors import SelectionError
from reparam.parameterizations import UnitAxis

# Models whose attention and MLP matrices are HF Conv1D, (in, out), by config.json's model_type.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True)
class Units:
    """The unit axis of one weight, and whether it was a guess."""

    unit: UnitAxis
    assumed: bool = False


def infer(
    plain_key: str,
    shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    g_shape: tuple[int, ...] | None,
    config: Mapping[str, Any],
) -> Units:
    """Unit axis of a weight from its name, shapes and the folder's config.json.

    Args:
        plain_key: key of the plain weight.
        shape: of the weight.
        bias_shape: of the tensor where its bias would be, None without.
        g_shape: of weight normalization's g, None without.
        config: config.json, empty without.
    """
    layer, param = dialects.split(plain_key)
    if dialects.is_expert_stack(plain_key, len(shape)):
        fits = [axis for axis in (1, 2) if bias_shape in (None, (shape[0], shape[axis]))]
        return Units(UnitAxis(fits[0] if fits else 1, shape[0]), assumed=len(fits) != 1)
    if param != "weight" or (len(shape) == 2 and bias_shape is None):
        return Units(UnitAxis())  # torch's own names are (out, in), and HF Conv1D always has a bias
    candidates = _candidates(shape, bias_shape)
    if len(shape) == 2 and len(candidates) > 1 and config:
        conv1d = config.get("model_type") in _CONV1D_MODELS and layer.rpartition(".")[2] in _CONV1D_LAYERS
        return Units(UnitAxis(1 if conv1d else 0))
    if g_shape is not None and len(g_shape) == len(shape) and _kept(g_shape) == [1]:
        # Norms taken over all axes but the second: somebody named dim=1, as for a transposed convolution.
        candidates = [c for c in candidates if c.axis == 1] or candidates
    if not candidates:
        return Units(UnitAxis(), assumed=True)
    return Units(candidates[0], assumed=len(candidates) > 1)


def _candidates(shape: tuple[int, ...], bias_shape: tuple[int, ...] | None) -> list[UnitAxis]:
    """Unit axes that agree with the bias, the likeliest first; those that give the same rows are one."""
    if bias_shape is None:
        plain, turned = UnitAxis(), UnitAxis(1)
        return [plain] if _same_rows(shape, plain, turned) else [plain, turned]
    if len(bias_shape) != 1:
        return []
    units = bias_shape[0]
    found = [UnitAxis()] if units == shape[0] else []
    if shape[1] and units % shape[1] == 0:
        turned = UnitAxis(1, units // shape[1])
        matrix = len(shape) == 2 and turned.groups > 1
        if not matrix and turned.fits(shape) and not (found and _same_rows(shape, found[0], turned)):
            found.append(turned)
    return found


def _same_rows(shape: tuple[int, ...], a: UnitAxis, b: UnitAxis) -> bool:
    """Whether both axes give the same matrix: with one unit a block, or one input a unit, there is nothing to turn."""
    return a.units(shape) == b.units(shape) and shape[1] == 1


def _kept(g_shape: tuple[int, ...]) -> list[int]:
    return [axis for axis, extent in enumerate(g_shape) if extent != 1]


def override(
    plain_key: str, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None, axes: Mapping[str, int]
) -> UnitAxis | None:
    """The axis the user named for this layer with ``--axis GLOB=N``, None where no pattern fits.

    Raises:
        SelectionError: the weight has no such axis.
    """
    for pattern, axis in axes.items():
        if not matches(plain_key, pattern):
            continue
        groups = 1
        if dialects.is_expert_stack(plain_key, len(shape)):
            groups = shape[0]
        elif axis == 1 and bias_shape is not None and len(bias_shape) == 1 and len(shape) > 2:
            groups = max(1, bias_shape[0] // shape[1])
        unit = UnitAxis(axis, groups)
        if not unit.fits(shape):
            raise SelectionError(
                f"--axis {pattern}={axis}: '{plain_key}' of shape {list(shape)} has no such unit axis"
            )
        if bias_shape is not None and math.prod(bias_shape) != unit.units(shape):
            raise SelectionError(
                f"--axis {pattern}={axis}: the bias of '{plain_key}' has {math.prod(bias_shape)} elements, that axis of"
                f" {list(shape)} counts {unit.units(shape)} units"
            )
        return unit
    return None


def matches(plain_key: str, pattern: str) -> bool:
    """Whether a glob names a layer, by its name or by the key of its weight."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in (dialects.layer_name(plain_key), plain_key))
