"""Names: which tensors of a file make up one layer, and what its tensors are called in each dialect.

| dialect | names | who writes it |
|---|---|---|
| plain | weight, bias | everyone |
| weight_norm | weight_g, weight_v | torch.nn.utils.weight_norm |
| parametrizations | parametrizations.weight.original0, .original1 | torch.nn.utils.parametrizations.weight_norm |
| clip-gmp | r (out, 1), theta (out, in), Cartesian | CLIP fine-tunes; weight normalization by another name |
| gmp | r, theta, lambda_ | this tool |

A layer is known by the key of its plain weight, "conv1.weight", whatever it is stored as.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: how each ``--layout`` of weight normalization is called on the command line
WEIGHT_NORM_DIALECTS = ("weight_norm", "parametrizations", "clip-gmp")
DEFAULT_DIALECT = {"sp": "plain", "wn": "weight_norm", "gmp": "gmp", "unit": "weight_norm"}
#: roles whose tensors are the layer's weight; the rest is its bias
WEIGHT_ROLES = frozenset({"weight", "weight_g", "weight_v", "r", "theta"})

# Parameters that are rows of weights, by their own name. hr is the projection of a projected LSTM.
_WEIGHT = re.compile(r"(weight(_(ih|hh|hr)(_l\d+)?(_reverse)?)?|in_proj_weight|[qkv]_proj_weight)")


def split(plain_key: str) -> tuple[str, str]:
    """Layer and parameter of a state_dict key; the layer of a top-level parameter is ''."""
    layer, _, param = plain_key.rpartition(".")
    return layer, param


def join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def layer_name(plain_key: str) -> str:
    """What people call the layer: its module for ``weight``, the parameter's own key otherwise."""
    layer, param = split(plain_key)
    return layer if param == "weight" and layer else plain_key


def is_weight(plain_key: str, ndim: int) -> bool:
    """Whether a plain tensor of this name can be the weight of a layer."""
    _, param = split(plain_key)
    if _WEIGHT.fullmatch(param):
        return True
    return is_expert_stack(plain_key, ndim) and not param.endswith(("bias", "scale", "scales", "blocks"))


def is_expert_stack(plain_key: str, ndim: int) -> bool:
    """A three-dimensional parameter below a module named experts holds one matrix an expert."""
    layer, _ = split(plain_key)
    return ndim == 3 and "experts" in layer.split(".")


def bias_key(plain_key: str) -> str:
    """Key of the bias that belongs to a weight."""
    layer, param = split(plain_key)
    if "weight" in param:
        return join(layer, param.replace("weight", "bias", 1))
    return plain_key + "_bias"


def key_of(dialect: str, plain_key: str, role: str) -> str:
    """Key of one tensor of a layer."""
    layer, param = split(plain_key)
    if role == "weight":
        return plain_key
    if role == "bias":
        return bias_key(plain_key)
    if dialect == "weight_norm":
        return {"weight_g": plain_key + "_g", "weight_v": plain_key + "_v"}[role]
    if dialect == "parametrizations":
        number = {"weight_g": 0, "weight_v": 1}[role]
        return join(layer, f"parametrizations.{param}.original{number}")
    base = layer if param == "weight" else plain_key
    if dialect == "clip-gmp":
        return join(base, {"weight_g": "r", "weight_v": "theta"}[role])
    assert dialect == "gmp", dialect
    return join(base, role)


def weight_norm_keys(keys: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Pairs that look like weight normalization: plain key -> (dialect, key of g, key of v)."""
    keys = set(keys)
    found: dict[str, tuple[str, str, str]] = {}
    for key in keys:
        if key.endswith("_g") and _WEIGHT.fullmatch(split(key[:-2])[1]) and key[:-2] + "_v" in keys:
            found[key[:-2]] = ("weight_norm", key, key[:-2] + "_v")
        elif key.endswith(".original0"):
            head, _, param = key.removesuffix(".original0").rpartition(".")
            layer, _, marker = head.rpartition(".")
            if marker == "parametrizations" and key[:-1] + "1" in keys:
                found[join(layer, param)] = ("parametrizations", key, key[:-1] + "1")
        elif split(key)[1] == "r" and join(split(key)[0], "theta") in keys:
            layer = split(key)[0]
            found[join(layer, "weight")] = ("clip-gmp", key, join(layer, "theta"))
    return found
