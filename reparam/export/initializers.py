"""The initializers of an exported graph that is still in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnxscript import ir
from torch import Tensor

from reparam.onnxfile import transforms
from reparam.onnxfile.external import DataWriter, raw
from reparam.onnxfile.reading import TYPES
from reparam.onnxfile.weight_map import WeightMap

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

#: Smaller values stay in the ONNX file: shapes, scalars.
_SMALL = 256


def nbytes(value: ir.Value) -> int:
    """Of an initializer's elements."""
    return 0 if value.const_value is None else int(value.const_value.nbytes)


@dataclass(frozen=True)
class Held:
    """An initializer as :func:`reparam.onnxfile.mapping.find_map` takes it."""

    value: ir.Value

    @property
    def is_known(self) -> bool:
        return self.value.const_value is not None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(extent) for extent in self._tensor.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        return TYPES.get(int(self._tensor.dtype))

    @property
    def _tensor(self) -> Any:
        assert self.value.const_value is not None
        return self.value.const_value

    def tensor(self) -> Tensor:
        if isinstance(own := getattr(self._tensor, "raw", None), Tensor):
            return own.detach().cpu()
        dtype = self.dtype
        assert dtype is not None
        values = np.ascontiguousarray(self._tensor.numpy())
        if not values.size:
            return torch.empty(self.shape, dtype=dtype)
        return torch.from_numpy(values.reshape(-1).view(np.uint8).copy()).view(dtype).reshape(self.shape)


def hold_as_mapped(program: ONNXProgram, weights: WeightMap, state: Mapping[str, Tensor]) -> None:
    """Give folded batch norms the element type of the model.

    The exporter folds in numpy, which promotes bfloat16 to float32: its graph would mix the two, which no runtime takes.
    """
    for name, source in weights.sources.items():
        value = program.model.graph.initializers[name]
        wanted = state[source.keys[0]].dtype
        if not source.transform.startswith("batch_norm") or Held(value).dtype == wanted:
            continue
        tensor = transforms.apply(source, state, wanted)
        array = tensor.view(torch.int16).numpy() if wanted == torch.bfloat16 else tensor.numpy()
        kind = next(kind for kind, dtype in TYPES.items() if dtype == wanted)
        if wanted == torch.bfloat16:
            array = array.view(ir.DataType(kind).numpy())
        value.const_value = ir.Tensor(array, dtype=ir.DataType(kind), name=name)
        value.dtype = ir.DataType(kind)


def move_outside(program: ONNXProgram, target: Path) -> Path:
    """Write the values to a data file beside ``target``, and let the graph refer to it; its name."""
    places: dict[str, tuple[int, int]] = {}
    values = program.model.graph.initializers
    with DataWriter(target) as writer:
        for name, value in values.items():
            if nbytes(value) >= _SMALL:
                data = raw(Held(value).tensor())
                places[name] = writer.write(data), len(data)
        file = writer.finish()
    for name, (offset, length) in places.items():
        inside = values[name].const_value
        assert inside is not None
        shape = Held(values[name]).shape
        values[name].const_value = ir.ExternalTensor(
            file.name,
            offset,
            length,
            inside.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=target.parent,
        )
    return file
