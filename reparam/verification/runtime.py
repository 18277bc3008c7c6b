"""A file in ONNX Runtime: on the provider that was asked for, and on no other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from reparam.onnxfile.reading import TYPES, graphs
from reparam.verification.widening import FLOATS, widen

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class RuntimeFailed(Exception):  # noqa: N818
    """ONNX Runtime would not load or run the file; one line."""


@dataclass
class Session:
    """A loaded file.

    Attributes:
        names: of its inputs.
        inputs: their types.
        outputs: names of its outputs.
        types: of its outputs, as the file declares them.
        widened: bfloat16 is computed in float32.
    """

    names: list[str]
    inputs: list[torch.dtype | None]
    outputs: list[str]
    types: list[torch.dtype | None]
    widened: bool
    session: Any

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Its outputs.

        Raises:
            RuntimeFailed: it does not run.
        """
        feeds = {
            name: (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy()
            for name, x in zip(self.names, inputs, strict=True)
        }
        try:
            values = self.session.run(self.outputs, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RuntimeFailed(line(error)) from error
        return [torch.from_numpy(value) if value.ndim else torch.tensor(value) for value in values]


def open_session(
    model: onnx.ModelProto, path: Path, outputs: Sequence[str] | None = None, provider: str = CPU
) -> Session:
    """Load a file.

    Args:
        model: its graph, external values not loaded.
        path: where it is.
        outputs: names of the graph's values to give instead of its outputs.
        provider: where it is to run. A provider that does not load is a failure, not a reason for another.

    Raises:
        RuntimeFailed: it does not load.
    """
    import onnxruntime as ort

    declared = [TYPES.get(value.type.tensor_type.elem_type) for value in model.graph.output]
    widened = uses(model, TensorProto.BFLOAT16)
    source: str | bytes = str(path)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised too
    try:
        if widened or outputs is not None:
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            if outputs is not None:
                del changed.graph.output[:]
                changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
                declared = [None] * len(outputs)
            if widened:
                onnx.load_external_data_for_model(changed, str(path.parent))
                changed = widen(changed, {TensorProto.BFLOAT16}, TensorProto.FLOAT)
            source = changed.SerializeToString()
            folder = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(folder, str(path.resolve().parent))
        given = [(provider, {"use_tf32": "0"})] if provider == CUDA else [provider]
        # By itself it goes on with another provider where one fails, on loading and on running, and prints so.
        ort.set_default_logger_severity(4)  # why CUDA's libraries do not load is raised too
        session = ort.InferenceSession(source, options, providers=given, enable_fallback=0)
    except Exception as error:  # as above
        raise RuntimeFailed(line(error)) from error
    finally:
        ort.set_default_logger_severity(2)  # as it is by default
    used = session.get_providers()
    if used[0] != provider:
        raise RuntimeFailed(f"{provider} did not load, ONNX Runtime would use {used[0]} instead")
    # The file's own names, in its own order; what holds an initial value is no input.
    held = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in held]
    return Session(
        [value.name for value in values],
        [TYPES.get(value.type.tensor_type.elem_type) for value in values],
        [value.name for value in session.get_outputs()],
        declared,
        widened,
        session,
    )


def cuda_obstacle() -> str | None:
    """Why a file cannot be run on a GPU here; None if it can be tried."""
    import onnxruntime as ort

    if CUDA not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider"
    if not os.path.exists("/dev/nvidiactl") and not torch.cuda.is_available():
        return "no NVIDIA GPU"
    return None


def uses(model: onnx.ModelProto, kind: int) -> bool:
    """Whether any tensor or cast of a file has an element type."""
    for graph in graphs(model):
        if isinstance(graph, onnx.GraphProto):
            if any(tensor.data_type == kind for tensor in graph.initializer):
                return True
            values = (*graph.input, *graph.output, *graph.value_info)
            if any(value.type.tensor_type.elem_type == kind for value in values):
                return True
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.t.data_type == kind or (
                    attribute.name in ("to", "dtype") and attribute.i == kind
                ):
                    return True
    return False


def deployed_dtype(model: onnx.ModelProto) -> torch.dtype:
    """The floating type that most of a file's weights have; that of its inputs where it has none."""
    counts: dict[int, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in (*FLOATS, TensorProto.DOUBLE):
            numel = 1
            for extent in tensor.dims:
                numel *= extent
            counts[tensor.data_type] = counts.get(tensor.data_type, 0) + numel
    for value in model.graph.input:
        if value.type.tensor_type.elem_type in (*FLOATS, TensorProto.DOUBLE):
            counts.setdefault(value.type.tensor_type.elem_type, 0)
    return TYPES[max(counts, key=lambda kind: counts[kind])] if counts else torch.float32


def line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())
