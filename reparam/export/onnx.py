"""A plain model as an ONNX file, by torch's own exporter: quietly, and without the machine's paths in it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reparam.errors import CheckFailedError, ReparamError
from reparam.graph.inputs import InputSpec

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

# Extents of the dynamic axes while capturing; 0 and 1 would be specialized.
_CAPTURED_FIRST, _CAPTURED_OTHER = 2, 32
# The exporter notes for every node which lines of which files made it: paths of the user's machine.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


def example_inputs(specs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    """One seeded input of each spec: a leading dynamic axis of extent 2, others of 32."""
    sizes = {axis: _CAPTURED_OTHER for spec in specs for axis in spec.dynamic}
    sizes |= {spec.axes[0]: _CAPTURED_FIRST for spec in specs if isinstance(spec.axes[0], str)}
    generator = torch.Generator().manual_seed(0)
    return tuple(spec.sample(generator, sizes) for spec in specs)


def export_onnx_model(
    model: nn.Module, specs: Sequence[InputSpec], path: Path, opset: int | None = None
) -> None:
    """Export a plain model to one ONNX file and wait until it is on disk.

    Args:
        model: in evaluation mode; takes the inputs positionally.
        specs: its inputs, in order. Their dynamic axes stay dynamic in the file, under the same names.
        path: where to write; replaced if it exists.
        opset: version of the default operator set, the exporter's default without.

    Raises:
        ReparamError: the model is in training mode, or does not take such inputs.
        CheckFailedError: it cannot be exported, or an axis named dynamic is fixed inside the model.
    """
    training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ReparamError(
            f"the model is in training mode ({training[0]}): call model.eval() before exporting"
        )
    inputs = example_inputs(specs)
    _dry_run(model, inputs)
    dims = {axis: torch.export.Dim(axis, min=1) for spec in specs for axis in spec.dynamic}
    shapes = tuple({i: dims[a] for i, a in enumerate(spec.axes) if isinstance(a, str)} for spec in specs)
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in specs],
                dynamic_shapes=shapes,
            )
        except Exception as error:  # exporters raise whatever the captured code raises
            raise CheckFailedError(f"the model cannot be exported: {_root_cause(error)}") from error
        assert program is not None
        _require_dynamic(program, specs)
        _anonymize(program)
        program.save(path, external_data=False)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _dry_run(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise ReparamError(f"--input: the model does not take {shapes}: {_root_cause(error)}") from error


def _require_dynamic(program: ONNXProgram, specs: Sequence[InputSpec]) -> None:
    """The exporter fixes an axis the model depends on, even one that was named dynamic, and says nothing."""
    for spec, value in zip(specs, program.model.graph.inputs, strict=True):
        for i, axis in enumerate(spec.axes):
            extent = None if value.shape is None else value.shape[i]
            if isinstance(axis, str) and isinstance(extent, int):
                raise CheckFailedError(
                    f"the model cannot be exported: axis {axis} of {spec.name} is fixed at {extent} in it; "
                    f"make the model independent of it, or write {extent} instead of {axis} in --input"
                )


def _anonymize(program: ONNXProgram) -> None:
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)
    for function in program.model.functions.values():
        for node in function.all_nodes():
            node.metadata_props.pop(_STACK_TRACE, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter prints, logs and warns about its own workings is dropped; what it raises is not."""
    disabled = logging.root.manager.disable
    sink: Any = io.StringIO()
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error: the outer ones say that an export failed, not why."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
