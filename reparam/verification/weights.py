"""Weights: every initializer of the file equals its source bit for bit.

    initializer = transform(state_dict[keys])        in every bit, through the recorded map

No comparison of outputs sees a weight of a dead unit, or one bit of one weight in half precision. This one does; what it
cannot see is whether the graph uses the weights rightly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.onnxfile import transforms
from reparam.onnxfile.folded_norms import WITHIN
from reparam.onnxfile.mapping import find_map
from reparam.onnxfile.reading import Initializer, read_initializers
from reparam.onnxfile.weight_map import Source, WeightMap
from reparam.verification.exact import Run
from reparam.verification.reaching import constant_tensors, read_names
from reparam.verification.report import Check
from reparam.verification.rounding import by_rounding

_LISTED = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class WeightProof:
    """What the proof found.

    Attributes:
        checks: one for all initializers if they are right, else one for each of the first few that are not.
        notes: what it cannot speak of.
        key: of the first wrong weight, in the order of the file.
        by_rounding: whether there are wrong ones, and all are by rounding alone.
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    key: str | None = None
    by_rounding: bool = False


def check_weights(
    path: Path,
    model: onnx.ModelProto,
    weight_map: WeightMap,
    state: Mapping[str, Tensor],
    used: Collection[str] = (),
    constants: Mapping[str, Tensor] | None = None,
) -> WeightProof:
    """Hold every initializer against the state_dict.

    Args:
        path, model: the file, external values not loaded.
        weight_map: where its initializers come from.
        state: the plain state_dict, in the types the file was made from.
        used: keys the network computes with: each must be held by an initializer that the outputs depend on.
        constants: buffers that the state_dict leaves out: an initializer that holds one is no weight.
    """
    initializers = read_initializers(path, model)
    wrong: list[tuple[str, Check]] = []
    compared = rounded = 0
    for name, source in weight_map.sources.items():
        key = source.keys[0]
        missing = [key for key in source.keys if key not in state]
        if name not in initializers:
            found: str | None = f"the file has no initializer `{name}` for it"
            largest = None
        elif missing:
            key, largest = missing[0], None
            found = f"initializer `{name}` is said to hold it, the network has no such key"
        else:
            try:
                value = initializers[name]
                wanted = transforms.apply(source, state, value.dtype)
                found, largest = _difference(value, wanted, _rounding(source, value))
                rounded += largest is not None and by_rounding(value.tensor(), wanted, source, state)
            except (ReparamError, RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
                found, largest = f"initializer `{name}`: {' '.join(str(error).split())}", None
            compared += initializers[name].tensor().numel() if found is None else 0
        if found is not None:
            wrong.append((key, Check("weight", False, largest, where=f"`{key}`: {found}", proof="weights")))
    unheld, notes = _check_held(path, model, weight_map, initializers, state, used, constants or {})
    wrong += unheld
    if wrong:
        order = {key: i for i, key in enumerate(state)}
        wrong.sort(key=lambda item: order.get(item[0], len(order)))
        checks = tuple(check for _, check in wrong[:_LISTED])
        if len(wrong) > _LISTED:
            checks += (Check("weights", False, where=f"{len(wrong)} in all", proof="weights"),)
        return WeightProof(checks, notes, wrong[0][0], rounded == len(wrong))
    told = f"{len(weight_map.sources)} initializers, {compared:,} values, bit for bit"
    return WeightProof((Check("weights", compared > 0, 0.0, where=told, proof="weights"),), notes)


def _check_held(
    path: Path,
    model: onnx.ModelProto,
    weight_map: WeightMap,
    initializers: Mapping[str, Initializer],
    state: Mapping[str, Tensor],
    used: Collection[str],
    constants: Mapping[str, Tensor],
) -> tuple[list[tuple[str, Check]], tuple[str, ...]]:
    """Used keys that should be held by an initializer which the outputs depend on, and are not; and notes."""
    free = {name: value for name, value in initializers.items() if name not in weight_map.sources}
    unknown = [name for name, value in free.items() if _may_hold(value)]
    unread = initializers.keys() - read_names(model)
    proven = {key for name, source in weight_map.sources.items() if name not in unread for key in source.keys}
    mapped = {key for source in weight_map.sources.values() for key in source.keys}
    held = proven & state.keys()
    unproven = _unproven(held, state, used)
    lost = [key for key in unproven if not _may_be_shared(state[key], held, state, free.values())]
    strangers: dict[str, Initializer] = {}
    if unproven:
        inside = free | constant_tensors(path, model)
        strangers = _strangers(inside, {**constants, **state})
    wrong = []
    for key in unproven:
        alike = [
            name
            for name, value in strangers.items()
            if name == key or (name not in unproven and _fits(value, state[key]))
        ]
        if key in lost:
            alike += [name for name in unknown if _could_be(free[name], key, state[key])]
        if alike or (key in lost and (key in mapped or not unknown)):  # mapped: to what nothing reads
            told = "no initializer holds it, though the network computes with it"
            told += f"; `{alike[0]}` would fit, but has other values" if alike else ""
            wrong.append((key, Check("weight", False, where=f"`{key}`: {told}", proof="weights")))
    if not unknown:
        return wrong, ()
    names = ", ".join(unknown[:_LISTED])
    told = f"; not found in the file: {', '.join(lost[:_LISTED])}" if lost else ""
    return wrong, (f"weights: no key is known for {names}: outputs alone speak for them{told}",)


def _rounding(source: Source, value: Initializer) -> float:
    """How far an initializer may be off: only where an exporter folded a batch norm, and rounded otherwise than here."""
    if value.dtype is None or "within" not in source.settings:
        return 0.0
    return min(float(source.settings["within"]), WITHIN[value.dtype])


def _could_be(value: Initializer, key: str, weight: Tensor) -> bool:
    """Whether an initializer is likely to be a changed copy of a weight."""
    return value.proto.name == key or int(np.prod(value.shape)) == weight.numel()


def _fits(value: Initializer, weight: Tensor) -> bool:
    """Whether a tensor has a weight's shape, axes in any order."""
    shapes = [sorted(size for size in shape if size != 1) for shape in (value.shape, weight.shape)]
    return shapes[0] == shapes[1]


def _difference(initializer: Initializer, wanted: Tensor, within: float) -> tuple[str | None, float | None]:
    """How an initializer differs from what it should be, and the largest difference; (None, None) if it does not.

    ``within`` is a share of the largest value wanted.
    """
    name, got = initializer.proto.name, initializer.tensor()
    if got.shape != wanted.shape:
        return f"initializer `{name}` is {list(got.shape)}, should be {list(wanted.shape)}", None
    if got.dtype != wanted.dtype:
        return f"initializer `{name}` is {got.dtype}, should be {wanted.dtype}", None
    if same_bits(got, wanted):
        return None, None
    unequal = _bits(got) != _bits(wanted)
    first = [int(i) for i in np.unravel_index(int(unequal.reshape(-1).int().argmax()), tuple(got.shape))]
    apart = (got.double() - wanted.double()).abs().nan_to_num(nan=torch.inf)
    largest = float(apart.max())
    if within and largest <= within * float(wanted.double().abs().max()):
        return None, None
    told = (
        f"{int(unequal.sum())} of {got.numel()} values of initializer `{name}` differ, the first at {first}"
    )
    return told, largest if largest != float("inf") else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and type and the same bits: 0.0 is not −0.0, and a NaN is itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous()
    return flat if flat.dtype == torch.bool else flat.view(_BITS[flat.dtype.itemsize])


def _may_hold(value: Initializer) -> bool:
    """Whether an initializer could hold weights: floats, and more than one."""
    return _is_floating(value) and int(np.prod(value.shape)) > 1


def _is_floating(value: Initializer) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point


def _unproven(held: Collection[str], state: Mapping[str, Tensor], used: Collection[str]) -> list[str]:
    """Used keys that no initializer of the map holds. Tied ones are held by any of them."""
    places = {_place(state[key]) for key in held}
    return [key for key, x in state.items() if key in used and key not in held and _place(x) not in places]


def _may_be_shared(
    value: Tensor, held: Collection[str], state: Mapping[str, Tensor], free: Collection[Initializer]
) -> bool:
    """Whether a weight needs no initializer of its own in the map.

    Of equal ones exporters keep one, of the map or of the ``free``, whose source is not known. A bias of zeros needs no
    place at all: exporters drop what adds nothing, and a weight of zeros that is lost shows in what the graph computes.
    """
    return (
        not bool(value.any())
        or any(same_bits(value, state[other]) for other in held)
        or any(other.shape == value.shape and same_bits(value, other.tensor()) for other in free)
    )


def _strangers(free: Mapping[str, Initializer], state: Mapping[str, Tensor]) -> dict[str, Initializer]:
    """Floats that hold nothing of ``state``, however it is rearranged; a single number only under a key's name."""
    found = find_map(free, state)
    known = {*found.weights.sources, *found.ambiguous}
    return {
        name: value
        for name, value in free.items()
        if name in found.unknown or (name in state and name not in known and _is_floating(value))
    }


def used_keys(model: nn.Module, run: Run) -> set[str]:
    """The floating tensors of its state_dict that ``model`` computed with in ``run``."""
    return {
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and value.numel() and _place(value) in run.recorder.touched
    }


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
