"""What is in a checkpoint, from its headers; values are read only for statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.checkpoint.layers import Layer, find_layers
from reparam.checkpoint.reading import Checkpoint, open_checkpoint
from reparam.errors import NonFiniteError

#: by their name: torch's running statistics and counter, and the means of this library
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "running_input_mean")


@dataclass(frozen=True)
class Statistics:
    """Norms of a layer's units, from its plain weight.

    Attributes:
        smallest, largest: norm of a unit.
        dead: units whose weights are all zero.
        zeros: share of the weights that are zero.
        non_finite: the weight holds NaN or Inf; the other figures are then zero.
    """

    smallest: float = 0.0
    largest: float = 0.0
    dead: int = 0
    zeros: float = 0.0
    non_finite: bool = False


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's layers and other tensors.

    Attributes:
        checkpoint: its headers.
        layers: every layer, in file order.
        others: every other tensor with the reason why it is no layer.
        statistics: by layer key; empty unless asked for.
    """

    checkpoint: Checkpoint
    layers: tuple[Layer, ...]
    others: dict[str, str]
    statistics: dict[str, Statistics]

    @property
    def parameters(self) -> int:
        """Elements of all parameters, each shared one counted once."""
        return self._count(buffers=False)

    @property
    def buffers(self) -> int:
        """Elements of what is not trained: running statistics and their counters, integers such as position ids."""
        return self._count(buffers=True)

    def _count(self, buffers: bool) -> int:
        return sum(
            info.numel
            for key, info in self.checkpoint.tensors.items()
            if key not in self.checkpoint.aliases and _is_buffer(key, info.dtype) == buffers
        )

    def to_json(self) -> dict[str, Any]:
        checkpoint = self.checkpoint
        return {
            "path": str(checkpoint.path),
            "files": [file.name for file in checkpoint.files],
            "tensors": len(checkpoint.tensors),
            "parameters": self.parameters,
            "buffers": self.buffers,
            "bytes": checkpoint.nbytes,
            "layers": [self._layer(layer) for layer in self.layers],
            "others": [
                {
                    "name": key,
                    "dtype": checkpoint.tensors[key].dtype,
                    "shape": list(checkpoint.tensors[key].shape),
                    "reason": reason,
                }
                for key, reason in self.others.items()
            ],
            "tied": checkpoint.aliases,
            "notes": list(checkpoint.notes),
        }

    def _layer(self, layer: Layer) -> dict[str, Any]:
        value: dict[str, Any] = {
            "name": layer.name,
            "kind": layer.kind,
            "dialect": layer.dialect,
            "shape": list(layer.spec.shape),
            "dtype": layer.spec.dtype,
            "stored": self.checkpoint.tensors[layer.weight_key].dtype,
            "axis": layer.spec.unit.axis,
            "groups": layer.spec.unit.groups,
            "axis_assumed": layer.assumed_axis,
            "units": layer.spec.units,
            "fan_in": layer.spec.fan_in,
            "bias": layer.bias,
            "tensors": layer.tensors,
        }
        if (found := self.statistics.get(layer.key)) is not None:
            value["statistics"] = vars(found)
        return value


def inspect_checkpoint(path: Path | str, stats: bool = False) -> Inspection:
    """Read the headers of a checkpoint, and with ``stats`` its weights too, one layer at a time.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    contents = find_layers(checkpoint)
    statistics = {layer.key: _statistics(checkpoint, layer) for layer in contents.layers} if stats else {}
    return Inspection(checkpoint, contents.layers, contents.others, statistics)


def _is_buffer(key: str, dtype: str) -> bool:
    """Whether torch would hold a tensor as a buffer: it trains no integers, though quantized weights may be narrow ones."""
    return key.rpartition(".")[2] in _BUFFERS or dtype in ("I64", "BOOL")


def _statistics(checkpoint: Checkpoint, layer: Layer) -> Statistics:
    from reparam.kernels.hyperspherical import row_norms
    from reparam.parameterizations import parameterization

    tensors = {role: checkpoint.tensor(key) for role, key in layer.tensors.items()}
    weight, _ = parameterization(layer.kind).compose(tensors, layer.spec)
    try:
        norms = row_norms(layer.spec.unit.to_rows(weight))
    except NonFiniteError:
        return Statistics(non_finite=True)
    zeros = float((weight == 0).double().mean())
    return Statistics(float(norms.min()), float(norms.max()), int((norms == 0).sum()), zeros)
