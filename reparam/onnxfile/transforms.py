"""How an initializer is made of tensors of the state_dict, one pure function an entry of a table.

    same                x
    transpose           x with its axes permuted: perm
    reshape             x in another shape, memory order kept: shape
    rows                x[start:stop], then permuted: one of the matrices that in_proj_weight stacks
    gates               recurrent weights: torch's gates in ONNX's order, joined over directions and biases: order, shape
    sum                 x + y: the two biases of a recurrent layer, merged
    batch_norm_weight   w · s,  s = γ / √(σ² + ε)     a batch norm folded into the layer before it by the exporter
    batch_norm_bias     (b − μ) · s + β

Folding is computed as exporters do it, every operation rounded to the type of the initializer, in this order: so the
result is theirs bit for bit, and not more exact.

Source: onnxscript's FuseBatchNormInto{Conv,ConvTranspose,Gemm}; the ONNX operators LSTM and GRU for the order of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reparam.onnxfile.weight_map import Source

#: gates a layer -> which of torch's gates stands where in ONNX: LSTM ifgo -> iofg (c is g), GRU rzn -> zrn, RNN
GATES: Mapping[int, tuple[int, ...]] = {4: (0, 3, 1, 2), 3: (1, 0, 2), 1: (0,)}

_Settings = Mapping[str, Any]
_Transform = Callable[[Sequence[Tensor], _Settings], Tensor]


def _same(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    (x,) = tensors
    return x


def _transpose(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    (x,) = tensors
    return x.permute(settings["perm"])


def _reshape(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    (x,) = tensors
    return x.reshape(settings["shape"])


def _rows(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    (x,) = tensors
    return x[settings["start"] : settings["stop"]].permute(settings["perm"])


def _gates(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    order = settings["order"]
    moved = [torch.cat([x.chunk(len(order))[gate] for gate in order]) for x in tensors]
    return torch.cat(moved).reshape(settings["shape"])


def _sum(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    x, y = tensors
    return x + y


def _batch_norm_weight(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    named = _named(tensors, settings)
    weight, scale = named["weight"], batch_norm_scale(named, settings["eps"])
    if settings["axis"] == 0:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    # A transposed convolution: (in, out per group, ...), its groups one after the other along the first axis.
    groups = len(scale) // weight.shape[1]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def _batch_norm_bias(tensors: Sequence[Tensor], settings: _Settings) -> Tensor:
    named = _named(tensors, settings)
    mean = named["running_mean"]
    shifted = (named["bias"] if "bias" in named else torch.zeros_like(mean)) - mean
    scaled = shifted * batch_norm_scale(named, settings["eps"])
    return scaled + named["beta"] if "beta" in named else scaled


def _named(tensors: Sequence[Tensor], settings: _Settings) -> dict[str, Tensor]:
    """The tensors by what they are to a fold: weight, bias, gamma, beta, running_mean, running_var."""
    return dict(zip(settings["roles"], tensors, strict=True))


def batch_norm_scale(named: Mapping[str, Tensor], eps: float) -> Tensor:
    """s = γ / √(σ² + ε) of ``named["running_var"]`` and, where there is one, ``named["gamma"]``."""
    var = named["running_var"]
    shifted = var + torch.tensor(eps, dtype=var.dtype)
    # By way of float64: torch's own float32 root is not the nearest everywhere, as numpy's is.
    deviation = shifted.double().sqrt().to(var.dtype)
    return named.get("gamma", torch.ones_like(var)) / deviation


TRANSFORMS: Mapping[str, _Transform] = {
    "same": _same,
    "transpose": _transpose,
    "reshape": _reshape,
    "rows": _rows,
    "gates": _gates,
    "sum": _sum,
    "batch_norm_weight": _batch_norm_weight,
    "batch_norm_bias": _batch_norm_bias,
}


def apply(source: Source, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The values of an initializer.

    Args:
        source: where they come from.
        state: the plain state_dict; not changed.
        dtype: of the initializer. Floating tensors are cast to it first, as a model that is cast and then exported;
            None leaves them as they are.

    Raises:
        KeyError: `state` lacks a key; or there is no such transform.
        RuntimeError, ValueError, TypeError, IndexError: tensors of these shapes cannot be transformed so.
    """
    tensors = [state[key].detach() for key in source.keys]
    if dtype is not None and dtype.is_floating_point:
        tensors = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    return TRANSFORMS[source.transform](tensors, source.settings).contiguous()
