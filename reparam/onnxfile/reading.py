"""An ONNX file's graph and the values of its initializers, one at a time.

Values may stand in the file, as raw bytes or as numbers, or outside of it: then only their own range of the other file
is read, and only from the file's own folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper
from torch import Tensor

from reparam.errors import CheckpointError

#: ONNX element type -> torch type
TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True)
class Initializer:
    """A named tensor of an ONNX file, whose values are read when asked for.

    Attributes:
        proto: as the file has it; external values are not loaded.
        file: the ONNX file.
    """

    proto: TensorProto
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.proto.dims)

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a type torch lacks."""
        return TYPES.get(self.proto.data_type)

    def tensor(self) -> Tensor:
        """The values, in memory of their own.

        Raises:
            CheckpointError: a type torch lacks, or external values that are not there.
        """
        name, dtype = self.proto.name, self.dtype
        if dtype is None:
            kind = TensorProto.DataType.Name(self.proto.data_type)
            raise CheckpointError(f"{self.file}: '{name}' has element type {kind}, which cannot be read")
        if self.proto.data_location != TensorProto.EXTERNAL and not self.proto.HasField("raw_data"):
            values = numpy_helper.to_array(self.proto)
            if dtype == torch.bfloat16:  # numpy has none of its own
                return torch.from_numpy(values.view(np.int16).copy()).view(dtype).reshape(self.shape)
            return torch.from_numpy(np.array(values)).reshape(self.shape)
        external = self.proto.data_location == TensorProto.EXTERNAL
        data = self.external_bytes() if external else bytearray(self.proto.raw_data)
        wanted = math.prod(self.shape) * dtype.itemsize
        if len(data) != wanted:
            raise CheckpointError(
                f"{self.file}: '{name}' has {len(data)} bytes, its shape and type take {wanted}"
            )
        if not wanted:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)

    def external_bytes(self) -> bytearray:
        """The values of one that lies outside, as they are there.

        Raises:
            CheckpointError: they are not there.
        """
        place = {entry.key: entry.value for entry in self.proto.external_data}
        file = external_file(self.file, self.proto)
        try:
            with file.open("rb") as opened:
                opened.seek(int(place.get("offset", 0)))
                if "length" not in place:
                    return bytearray(opened.read())
                data = bytearray(int(place["length"]))
                del data[opened.readinto(data) :]
                return data
        except OSError as error:
            reason = error.strerror
            raise CheckpointError(f"{file}: values of {self.file.name} cannot be read ({reason})") from error
        except (ValueError, MemoryError) as error:
            raise CheckpointError(f"{self.file}: '{self.proto.name}': its place is malformed") from error


def external_file(path: Path, tensor: TensorProto) -> Path:
    """The file beside ``path`` that holds a tensor's values.

    Raises:
        CheckpointError: a place outside of the folder of ``path``.
    """
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    rooted = PurePosixPath(location).is_absolute() or bool(PureWindowsPath(location).anchor)
    inside = (path.parent / location).resolve().is_relative_to(path.parent.resolve())
    if not location or ".." in parts or rooted or not inside:
        raise CheckpointError(
            f"{path}: the values of '{tensor.name}' are at {location!r}, which is not in the file's folder: refused"
        )
    return path.parent / location


def read_graph(path: Path) -> onnx.ModelProto:
    """The file without its external values; every place of one was looked at.

    Raises:
        CheckpointError: not there, not ONNX, or external values outside of the file's folder.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (DecodeError, ValueError) as error:
        raise CheckpointError(f"{path}: not an ONNX file") from error
    if not model.graph.output:
        raise CheckpointError(f"{path}: not an ONNX file, or one without outputs")
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            external_file(path, tensor)
    return model


def read_initializers(path: Path, model: onnx.ModelProto | None = None) -> dict[str, Initializer]:
    """The initializers of the main graph by name; ``model`` saves reading the file again."""
    model = model or read_graph(path)
    return {tensor.name: Initializer(tensor, path) for tensor in model.graph.initializer}


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The main graph, the functions, and the graphs inside of nodes."""
    todo: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while todo:
        graph = todo.pop(0)
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                todo += [attribute.g] if attribute.HasField("g") else []
                todo += attribute.graphs


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a file: initializers of all graphs, and tensors inside of nodes."""
    for graph in graphs(model):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
