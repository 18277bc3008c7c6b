"""What recurrent layers need besides: torch keeps a list of their weights, which here is composed on reading."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.layers.base import Reparameterized
from reparam.layers.part import GeometricPart


class RecurrentMixin(Reparameterized):
    """RNN, LSTM and GRU: ``_flat_weights`` is what their forward pass hands to torch's kernels.

    ``torch.compile`` breaks its graph at them, and refuses ``fullgraph=True``, as it does with torch's own.
    """

    input_size: int
    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        values = (getattr(self, name) for name in self._flat_weights_names)
        return [value.tensor() if isinstance(value, GeometricPart) else value for value in values]

    def _init_flat_weights(self) -> None:
        """Nothing is cached."""

    def _update_flat_weights(self) -> None:
        """Nothing is cached."""

    def flatten_parameters(self) -> None:
        """Composed weights have no storage to lay out for cuDNN."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """As the plain class does, without composing weights to see their dtype."""
        dtype = next(iter(self.held.values())).dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype})")
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )


RECURRENT: tuple[type[nn.Module], ...] = (nn.RNN, nn.LSTM, nn.GRU)
