"""How much memory training takes, and which part of a batch fits where it was too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reparam.layers.caching import CachesWeights
from reparam.training.recipe import Recipe


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes for one device. What the library, the allocator and single operations need comes on top.

    Attributes:
        parameters: of the whole network, buffers included.
        gradients, optimizer: of what is trained; the former also of composed weights, where a step is taken in parts.
        average: the moving average, where there is one.
        activations: what one part of a batch keeps for its backward pass.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations


def estimate(model: nn.Module, recipe: Recipe, forward: Callable[[int], Tensor], part: int) -> Memory:
    """What a training step takes.

    Args:
        model: on its device, frozen as it will be trained.
        forward: a loss of the first one or two samples, with gradient.
        part: samples of one part of a batch on one device.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    parameters = sum(_bytes(t) for t in tensors)
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    layers = [m for m in model.modules() if recipe.accumulate > 1 and isinstance(m, CachesWeights)]
    gathered = sum(_bytes(p) for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad)
    one, two = (_kept(model, forward, samples) for samples in (1, 2))
    # What does not grow with the batch, composed weights, is in both.
    activations = one + (two - one) * (part - 1)
    return Memory(
        parameters,
        trained + gathered,
        optimizer_bytes(model, recipe),
        parameters * (recipe.ema is not None),
        activations,
    )


def optimizer_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Of the moments an optimizer keeps of what is trained."""
    moments = int(recipe.momentum > 0) if recipe.optimizer == "sgd" else 2
    return moments * sum(_bytes(p) for p in model.parameters() if p.requires_grad)


def ran_out(error: Exception) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def advice(attempt: Callable[[int], object], batch: int, part: int, device: torch.device) -> str:
    """What to do where a part of a batch took too much memory: finds out how much fits.

    Args:
        attempt: forward and backward pass of so many samples.
        batch, part: samples of a step, and of the part that did not fit.
    """
    fits = _largest_fitting(attempt, part // 2)
    told = f"out of memory on {device} with {part} samples at once"
    if not fits:
        return f"{told}, and with one: this network needs a larger device, or --amp bf16"
    return f"{told}: {fits} fit: --accumulate {-(-batch // fits)} takes the same steps in parts, --batch-size {fits} smaller ones"


def _largest_fitting(attempt: Callable[[int], object], size: int) -> int:
    """The largest of size, size/2, size/4, ... for which ``attempt`` does not run out of memory; 0 for none."""
    while size:
        try:
            attempt(size)
        except (RuntimeError, ValueError) as error:
            if not ran_out(error):
                return 0  # a batch norm does not take one sample
        else:
            return size
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def _kept(model: nn.Module, forward: Callable[[int], Tensor], samples: int) -> int:
    """Bytes a forward pass keeps for its backward pass, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(samples)
    return sum(kept.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
