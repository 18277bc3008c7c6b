"""A plain model as an ONNX file, by torch's own exporter: quietly, small, and without the machine's paths in it.

    model → (cast) → torch.onnx.export → names of weights found → metadata → (data file, then) the ONNX file

The graph is the exporter's: same operators, same names. Beside it the file says which initializer holds which weight.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from onnxscript import ir
from torch import Tensor, nn

from reparam.errors import CheckFailedError, ReparamError
from reparam.export.casting import cast_model, cast_specs, opset_for
from reparam.export.conditions import quiet, uncollected
from reparam.export.constants import find_constants
from reparam.export.initializers import Held, hold_as_mapped, move_outside, nbytes
from reparam.export.second import Second, floating, resolve, second_export
from reparam.graph.inputs import InputSpec
from reparam.onnxfile.mapping import Found, find_map
from reparam.onnxfile.metadata import CONSTANTS, UNUSED
from reparam.onnxfile.weight_map import KEY

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

#: Files up to this size hold their values themselves; protobuf ends at 2³¹ bytes, graph and metadata included.
LARGEST = 2_000_000_000
# Extents of the dynamic axes while capturing; 0 and 1 would be specialized.
_CAPTURED_FIRST, _CAPTURED_OTHER = 2, 32


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        specs: the inputs of the file, floating ones in the type the model was cast to.
        found: which initializer holds which weight.
        unused: keys that the graph does not compute with.
        data: the file beside it that holds the values; None if it holds them itself.
    """

    specs: tuple[InputSpec, ...]
    found: Found
    unused: tuple[str, ...]
    data: Path | None


def example_inputs(specs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    """One seeded input of each spec: a leading dynamic axis of extent 2, others of 32."""
    sizes = {axis: _CAPTURED_OTHER for spec in specs for axis in spec.dynamic}
    sizes |= {spec.axes[0]: _CAPTURED_FIRST for spec in specs if isinstance(spec.axes[0], str)}
    generator = torch.Generator().manual_seed(0)
    return tuple(spec.sample(generator, sizes) for spec in specs)


@uncollected()
def export_onnx_model(
    model: nn.Module,
    specs: Sequence[InputSpec],
    path: Path,
    opset: int | None = None,
    dtype: str | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    target: Path | None = None,
    largest: int = LARGEST,
) -> Exported:
    """Export a plain model and wait until it is on disk.

    Args:
        model: in evaluation mode, on the CPU; takes the inputs positionally. Not changed.
        specs: its inputs, in order. Their dynamic axes stay dynamic in the file, under the same names.
        path: where to write; replaced if it exists.
        opset: version of the default operator set, the exporter's default without; for bf16 at least 22.
        dtype: "fp16" or "bf16": all of the model, and its floating inputs and outputs, are cast to it.
        metadata: properties of the file, see :mod:`reparam.onnxfile.metadata`; the map of its weights is added.
        target: the name ``path`` will have in the end, after which a data file is named.
        largest: bytes of values; of more, they lie in a data file beside the ONNX file, which is written first.

    Raises:
        ReparamError: the model is in training mode, or does not take such inputs, or does not fit the type.
        CheckFailedError: it cannot be exported, or an axis named dynamic is fixed inside the model.
    """
    training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ReparamError(
            f"the model is in training mode ({training[0]}): call model.eval() before exporting"
        )
    if dtype is not None:
        model, specs = cast_model(model, dtype), cast_specs(specs, dtype)
    output = _dry_run(model, example_inputs(specs))
    opset = opset_for(dtype, opset)
    program = bare_export(model, specs, opset)
    _require_dynamic(program, specs)
    _name_outputs(program, output)
    _anonymize(program)
    second = functools.cache(
        functools.partial(second_export, model, lambda other: bare_export(other, specs, opset))
    )
    found, unused = _map(program, model, second)
    said = {**(metadata or {}), KEY: found.weights.dump(), UNUSED: json.dumps(unused)}
    if constants := find_constants(program, found.weights, second):
        said[CONSTANTS] = json.dumps(constants)
    program.model.metadata_props.update(said)
    data = None
    if sum(map(nbytes, program.model.graph.initializers.values())) > largest:
        data = move_outside(program, target or path)
    # Not by `program.save`, which moves values outside by itself above 1.5 GB, under the name of the moment.
    ir.save(program.model, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Exported(tuple(specs), found, tuple(unused), data)


def bare_export(model: nn.Module, specs: Sequence[InputSpec], opset: int | None = None) -> ONNXProgram:
    """torch's own export, in memory and without a word.

    Raises:
        CheckFailedError: it fails.
    """
    dims = {axis: torch.export.Dim(axis, min=1) for spec in specs for axis in spec.dynamic}
    shapes = tuple({i: dims[a] for i, a in enumerate(spec.axes) if isinstance(a, str)} for spec in specs)
    for recurrent in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        # While it exports, torch has them loop over any length, but goes by which kernel it found the time before: that
        # of another export, whose length is fixed.
        recurrent._dispatch_cache.clear()
    with quiet():
        try:
            program = torch.onnx.export(
                model,
                example_inputs(specs),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in specs],
                dynamic_shapes=shapes,
            )
        except Exception as error:  # exporters raise whatever the captured code raises
            raise CheckFailedError(f"the model cannot be exported: {_root_cause(error)}") from error
    assert program is not None
    return program


def _map(
    program: ONNXProgram, model: nn.Module, second: Callable[[], Second | None]
) -> tuple[Found, list[str]]:
    """Which initializer holds which weight, and the keys that are not computed with."""
    state = {key: x.detach().cpu() for key, x in model.state_dict().items()}
    eps = {
        name: module.eps
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    initializers = {name: Held(value) for name, value in program.model.graph.initializers.items()}
    found = find_map({name: held for name, held in initializers.items() if held.is_known}, state, eps)
    used = _used(program)
    found = resolve(found, floating(program), state, used, second)
    hold_as_mapped(program, found.weights, state)
    return found, sorted(set(found.uncovered) - used)


def _used(program: ONNXProgram) -> set[str]:
    """The keys that the captured program computes with."""
    exported = program.exported_program
    assert exported is not None
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        targets[n.name]
        for n in exported.graph.nodes
        if n.op == "placeholder" and n.name in targets and n.users
    }


def _dry_run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What the model gives."""
    try:
        with torch.no_grad():
            return model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise ReparamError(f"--input: the model does not take {shapes}: {_root_cause(error)}") from error


def _name_outputs(program: ONNXProgram, output: Any) -> None:
    """Outputs that the model names bear its names; the exporter calls them after the operations that gave them."""
    graph = program.model.graph
    if not isinstance(output, Mapping) or not all(isinstance(value, Tensor) for value in output.values()):
        return
    inner = [value for node in graph.all_nodes() for value in node.outputs if value not in graph.outputs]
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values(), *inner)}
    if len(set(graph.outputs)) == len(output) and taken.isdisjoint(map(str, output)):
        for value, name in zip(graph.outputs, output, strict=True):
            value.name = str(name)


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
    """Drop what the exporter notes of every node: the lines of the files that made it, classes, its own workings."""
    graphs = [program.model.graph, *(function.graph for function in program.model.functions.values())]
    program.model.doc_string = None
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error: the outer ones say that an export failed, not why."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
