"""The first layer at which a file departs from the original.

Values along both networks are compared where they are known to be the same: the result of the node that takes a weight
is the result of the layer that holds it. They differ where a unit of the file's is further off than rounding explains, by
the rule of :mod:`~reparam.verification.pools`. Such places stand in the order they are computed; the file's value at the middle one
is asked for, and what is before or behind is dropped: O(log n) sessions of ONNX Runtime, each with one more output, and
one value of either network at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from reparam.onnxfile.weight_map import WeightMap
from reparam.verification.exact import Float64, Recorder, in_float64, run
from reparam.verification.pools import FLOOR, MAX_FACTOR, RMS_FACTOR
from reparam.verification.runtime import RuntimeFailed, open_session
from reparam.verification.samples import Sample

#: values are passed on by these as they are, or in another order
_SAME = (
    "Cast",
    "Identity",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "QuantizeLinear",
    "DequantizeLinear",
)
#: modules whose units are along axis 1 of their result, not along the last
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class _Place:
    """A layer in both networks.

    Attributes:
        key: of its weight.
        module: its name in torch.
        call: how many calls of it come before this one.
        value: name of its result in the file.
    """

    key: str
    module: str
    call: int
    value: str


def locate(
    folded: nn.Module, path: Path, model: onnx.ModelProto, weight_map: WeightMap, sample: Sample
) -> str | None:
    """The state_dict key of the first layer whose result differs though all before it agree; None if it is not found.

    Args:
        folded: the plain original.
        path, model: the file, external values not loaded.
        weight_map: where its initializers come from.
        sample: inputs at which the file is wrong.
    """
    places = _places(folded, model, weight_map)
    low, high = 0, len(places)  # results before low agree, that at high departs or is the end
    while low < high:
        middle = (low + high) // 2
        departed = _departed(folded, path, model, places[middle], sample)
        if departed is None:
            places.pop(middle)  # the file holds something else there
            high -= 1
        elif departed:
            high = middle
        else:
            low = middle + 1
    return places[low].key if low < len(places) else None


def _places(folded: nn.Module, model: onnx.ModelProto, weight_map: WeightMap) -> list[_Place]:
    """Layers of both networks, in the order the file computes them."""
    modules = dict(folded.named_modules())
    came_from = {name: source.keys[0] for name, source in weight_map.sources.items()}
    calls: dict[str, int] = {}
    places = []
    for i, node in enumerate(model.graph.node):
        for name in node.input:
            if name not in came_from:
                continue
            if node.op_type in _SAME and len(node.input) < 3:
                came_from.setdefault(node.output[0], came_from[name])  # a weight on its way to its layer
                continue
            key = came_from[name]
            module = key.rpartition(".")[0]
            if module not in modules or key.rpartition(".")[2].startswith("bias"):
                continue
            call = calls.get(module, 0)
            calls[module] = call + 1
            value = _with_bias(model, i, module, came_from)
            places.append(_Place(key, module, call, value))
            break
    return places


def _with_bias(model: onnx.ModelProto, index: int, module: str, came_from: dict[str, str]) -> str:
    """The result of a layer whose bias is added by a node of its own."""
    result = model.graph.node[index].output[0]
    for node in model.graph.node[index + 1 :]:
        if result in node.input and node.op_type == "Add":
            keys = [came_from[name] for name in node.input if name in came_from]
            if any(key.rpartition(".")[0] == module for key in keys):
                return str(node.output[0])
    return str(result)


def _departed(
    folded: nn.Module, path: Path, model: onnx.ModelProto, place: _Place, sample: Sample
) -> bool | None:
    """Whether the file's value at a place differs; None if the two are not comparable there."""
    wanted = _torch_value(in_float64(folded), place, sample.inputs, Float64())
    try:
        session = open_session(model, path, [place.value])
        given = [
            x.to(kind) if kind is not None and x.is_floating_point() else x
            for x, kind in zip(sample.inputs, session.inputs, strict=True)
        ]
        got = session.run(given)[0].double()
    except RuntimeFailed:
        return None
    own = _torch_value(folded, place, given, Recorder())
    if wanted is None or own is None or not wanted.is_floating_point():
        return None
    if wanted.numel() != got.numel():
        return True
    if wanted.shape != got.shape:  # the file has its axes in another order: so do all
        wanted, own, got = (x.flatten().sort().values for x in (wanted, own, got))
    if not bool(torch.isfinite(got).all()):
        return True
    alike = wanted.dim() > 1
    axis = 1 if isinstance(folded.get_submodule(place.module), _CHANNELS_FIRST) else -1
    return _differs(*(x.movedim(axis, 0).flatten(1) if alike else x.unsqueeze(0) for x in (wanted, own, got)))


def _differs(wanted: Tensor, own: Tensor, got: Tensor) -> bool:
    """Whether any unit is further off than rounding explains: three tensors of shape (units, values).

    Unit by unit, as the rounding of a loud one would hide what is wrong with a quiet one; but by no less than half of
    them are rounded, as that of few values is too small by chance.
    """
    error, noise = (got - wanted).abs(), (own.double() - wanted).abs()
    floor = FLOOR * wanted.abs().amax(1)
    for factor, measure in ((MAX_FACTOR, _largest), (RMS_FACTOR, _rms)):
        usual = torch.maximum(measure(noise), floor)
        if bool((measure(error) > factor * torch.maximum(usual, usual.median())).any()):
            return True
    return False


def _largest(x: Tensor) -> Tensor:
    return x.amax(1)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def _torch_value(
    model: nn.Module, place: _Place, inputs: Sequence[Tensor], recorder: Recorder
) -> Tensor | None:
    """The result of one call of a layer."""
    found: list[Tensor] = []
    count = 0

    def keep(module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        nonlocal count
        if count == place.call:
            value = output[0] if isinstance(output, tuple | list) else output
            found.append(value.detach().clone())
        count += 1

    handle = model.get_submodule(place.module).register_forward_hook(keep)
    try:
        run(model, inputs, recorder)
    finally:
        handle.remove()
    return found[0] if found else None
