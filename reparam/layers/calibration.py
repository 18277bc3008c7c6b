"""Running means from data: what mean normalization inserted into a trained model needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from reparam.errors import ReparamError
from reparam.layers.base import Reparameterized
from reparam.layers.mean_norm import input_first


@contextmanager
def calibrate(model: nn.Module) -> Iterator[None]:
    """Inside, every forward pass is counted; at the end each normalized layer's running mean is set to what it saw.

        with calibrate(model), torch.no_grad():
            for x in batches:
                model(x)

    The bias moves with the mean (λ += uᵀμ), so what the model computes in evaluation mode does not change, and one
    pass over the data is enough for all layers. Means are over all samples, whatever the batches. A layer that was
    not reached keeps its mean; if the block raises, all do.

    Raises:
        ReparamError: a layer is in training mode, where its outputs depend on the batch; or saw values whose mean is
            not finite.
    """
    counted: dict[Reparameterized, _Mean] = {}
    names: dict[Reparameterized, str] = {}
    handles = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Reparameterized) or layer.mean is None:
            continue
        if layer.training:
            raise ReparamError(f"`{name}` is in training mode: call model.eval() before calibrating")
        counted[layer], names[layer] = _Mean(layer.kind.channel), name
        hook = _count(counted[layer], layer.mean.kind)
        handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for layer, mean in counted.items():
        if not mean.sum.isfinite().all():
            raise ReparamError(
                f"`{names[layer]}` saw values whose mean is not finite: look for NaN in the data"
            )
    for layer, mean in counted.items():
        if mean.count:
            layer.set_mean(mean.sum / mean.count)


class _Mean:
    """Sum and count over all axes but the channel's, in float64."""

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.sum: Tensor = torch.zeros(())
        self.count = 0

    def add(self, x: Tensor) -> None:
        per_channel = x.detach().double().movedim(self.channel, 0).flatten(1) if x.dim() > 1 else x[:, None]
        self.sum = self.sum.to(per_channel.device) + per_channel.sum(1)
        self.count += per_channel.shape[1]


def _count(mean: _Mean, kind: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(layer, Reparameterized)
        (x, *_), _ = input_first(layer, args, kwargs)
        if kind == "mn":
            mean.add(x.data if isinstance(x, PackedSequence) else x)
        else:
            bias = layer.composed_bias()
            assert bias is not None
            mean.add(output.double() - bias.double().reshape(-1, *(1,) * layer.kind.spatial))

    return hook
