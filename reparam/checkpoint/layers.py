"""The layers of a checkpoint: which tensors belong together, how they are held, and why the rest is no layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from reparam.checkpoint import dialects, units
from reparam.checkpoint.header import TensorInfo
from reparam.checkpoint.metadata import LayerRecord
from reparam.checkpoint.reading import Checkpoint
from reparam.dtypes import FLOATING
from reparam.errors import CheckpointError, SelectionError
from reparam.parameterizations import WeightSpec, parameterization
from reparam.parameterizations.weight_norm import is_weight_norm


@dataclass(frozen=True)
class Layer:
    """One layer as a file holds it.

    Attributes:
        key: of its plain weight.
        kind: name of its parameterization.
        dialect: how its tensors are named.
        tensors: role -> key in the file.
        spec: its plain weight and bias.
        assumed_axis: the unit axis is a guess.
        tied_to: key of the layer whose weight it shares, None for its own.
    """

    key: str
    kind: str
    dialect: str
    tensors: dict[str, str]
    spec: WeightSpec
    assumed_axis: bool = False
    tied_to: str | None = None

    @property
    def name(self) -> str:
        return dialects.layer_name(self.key)

    @property
    def bias(self) -> str | None:
        """Role of the bias, None without."""
        return next((role for role in self.tensors if role not in dialects.WEIGHT_ROLES), None)

    @property
    def weight_key(self) -> str:
        """Key of the tensor that has one element a weight."""
        return next(self.tensors[role] for role in ("theta", "weight_v", "weight") if role in self.tensors)


@dataclass(frozen=True)
class Contents:
    """A checkpoint's layers, and its other tensors with the reason why each is none."""

    layers: tuple[Layer, ...]
    others: dict[str, str] = field(default_factory=dict)


def find_layers(checkpoint: Checkpoint, axes: Mapping[str, int] | None = None) -> Contents:
    """Sort every tensor of a checkpoint into a layer, or give the reason why it is in none.

    Args:
        checkpoint: its headers suffice.
        axes: unit axes by glob, as ``--axis`` gives them.

    Raises:
        CheckpointError: metadata and tensors contradict each other.
        SelectionError: a named axis does not exist.
    """
    infos = checkpoint.tensors
    layers = [_recorded(checkpoint, key, record) for key, record in checkpoint.records.items()]
    taken = {key for layer in layers for key in layer.tensors.values()}
    free = [key for key in infos if key not in taken]
    others: dict[str, str] = {}
    for plain_key, (dialect, g, v) in dialects.weight_norm_keys(free).items():
        layer = _weight_norm(checkpoint, plain_key, dialect, g, v, axes or {})
        if layer is None and dialect == "clip-gmp":
            continue  # an r and a theta of other shapes: looked at below
        if layer is None:
            others |= dict.fromkeys((g, v), "looks like a torch parametrization other than weight_norm")
        else:
            layers.append(layer)
            taken |= set(layer.tensors.values())
    for key in free:
        if key in taken or key in others:
            continue
        reason = _unsuitable(key, infos[key])
        if reason is None:
            layer = _plain(checkpoint, key, axes or {}, taken)
            layers.append(layer)
            taken |= set(layer.tensors.values())
        else:
            others[key] = reason
    others = {key: reason for key, reason in others.items() if key not in taken}
    if _sorted_by_type(infos):
        layers.sort(key=lambda layer: layer.key)
    else:
        order = {key: i for i, key in enumerate(infos)}
        layers.sort(key=lambda layer: order[layer.weight_key])
    layers = _tied(layers, checkpoint.aliases, axes or {})
    kept = {key for layer in layers for key in layer.tensors.values()}
    others |= dict.fromkeys(sorted(taken - kept), "bias of a layer that is tied to one with other units")
    return Contents(tuple(layers), others)


def _sorted_by_type(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether tensors stand as the safetensors library sorts them, by type and then by name.

    float32 angles stand before bfloat16 weights then, and layers are where they were by their names alone.
    """
    of_type: dict[str, list[str]] = {}
    for key, info in infos.items():
        of_type.setdefault(info.dtype, []).append(key)
    return all(keys == sorted(keys) for keys in of_type.values())


def _unsuitable(key: str, info: TensorInfo) -> str | None:
    """Why a plain tensor is not the weight of a layer; None if it is."""
    param = dialects.split(key)[1]
    if param == "theta":
        return "looks like GmP angles, but the file has no `reparam` metadata to tell their origin and fan-in"
    if not dialects.is_weight(key, len(info.shape)):
        return "not a layer's weight, by its name"
    if len(info.shape) < 2:
        return "fewer than two axes: a scale or a shift, not rows of weights"
    if info.dtype not in FLOATING:
        return f"{info.dtype} cannot be reparameterized"
    if info.numel == 0:
        return "empty"
    return None


def _bias_info(checkpoint: Checkpoint, plain_key: str, taken: set[str]) -> TensorInfo | None:
    key = dialects.bias_key(plain_key)
    info = checkpoint.tensors.get(key)
    usable = info is not None and key not in taken and info.dtype in FLOATING and 1 <= len(info.shape) <= 2
    return info if usable else None


def _plain(checkpoint: Checkpoint, key: str, axes: Mapping[str, int], taken: set[str]) -> Layer:
    info, bias = checkpoint.tensors[key], _bias_info(checkpoint, key, taken)
    stored = "F64" if info.dtype == "F64" else "F32"
    return _with_bias(
        checkpoint, Layer(key, "sp", "plain", {"weight": key}, WeightSpec(info.shape, info.dtype, stored=stored)),
        bias, None, axes,
    )  # fmt: skip


def _weight_norm(
    checkpoint: Checkpoint, plain_key: str, dialect: str, g_key: str, v_key: str, axes: Mapping[str, int]
) -> Layer | None:
    g, v = checkpoint.tensors[g_key], checkpoint.tensors[v_key]
    if dialect == "clip-gmp" and len(g.shape) != len(v.shape):
        return None
    usable = is_weight_norm(v.shape, g.shape) and v.numel > 0 and len(v.shape) >= 2
    if not usable or v.dtype not in FLOATING or g.dtype not in FLOATING:
        return None
    spec = WeightSpec(v.shape, v.dtype, stored="F64" if g.dtype == "F64" else "F32")
    layer = Layer(plain_key, "wn", dialect, {"weight_g": g_key, "weight_v": v_key}, spec)
    return _with_bias(checkpoint, layer, _bias_info(checkpoint, plain_key, set()), g.shape, axes)


def _with_bias(
    checkpoint: Checkpoint,
    layer: Layer,
    bias: TensorInfo | None,
    g_shape: tuple[int, ...] | None,
    axes: Mapping[str, int],
) -> Layer:
    """Find the unit axis, and the bias if it has one element a unit."""
    shape, bias_shape = layer.spec.shape, bias.shape if bias else None
    unit, assumed = units.override(layer.key, shape, bias_shape, axes), False
    if unit is None:
        found = units.infer(layer.key, shape, bias_shape, g_shape, checkpoint.config)
        unit, assumed = found.unit, found.assumed
    spec = replace(layer.spec, unit=unit)
    tensors = dict(layer.tensors)
    if bias is not None and bias.numel == spec.units:
        spec = replace(spec, bias_shape=bias.shape, bias_dtype=bias.dtype)
        tensors["bias"] = dialects.bias_key(layer.key)
    return replace(layer, spec=spec, tensors=tensors, assumed_axis=assumed)


def _recorded(checkpoint: Checkpoint, key: str, record: LayerRecord) -> Layer:
    """A layer as the file's metadata describes it, held against its tensors."""
    dialect = _recorded_dialect(checkpoint, key, record)
    tensors = {}
    for role, (dtype, shape) in parameterization(record.kind).tensors(record.spec, record.bias).items():
        name = dialects.key_of(dialect, key, role)
        if role == "lambda_" and name not in checkpoint.tensors:
            name = name.removesuffix("_")  # other writers spell it so
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is missing, which the metadata of layer '{key}' names"
            )
        if (info.dtype, info.shape) != (dtype, shape):
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is {info.dtype} {list(info.shape)}, the metadata says {dtype} {list(shape)}"
            )
        tensors[role] = name
    return Layer(key, record.kind, dialect, tensors, record.spec)


def _recorded_dialect(checkpoint: Checkpoint, key: str, record: LayerRecord) -> str:
    if record.kind != "wn":
        return dialects.DEFAULT_DIALECT[record.kind]
    for dialect in dialects.WEIGHT_NORM_DIALECTS:
        if dialects.key_of(dialect, key, "weight_v") in checkpoint.tensors:
            return dialect
    return dialects.DEFAULT_DIALECT["wn"]


def _tied(layers: list[Layer], aliases: Mapping[str, str], axes: Mapping[str, int]) -> list[Layer]:
    """Mark layers whose weight is another's. They share its unit axis: one weight has one set of units."""
    # The memory may be owned by a tensor that is no layer: then the first layer of it stands for the others.
    owners: dict[str, Layer] = {}
    marked = []
    for layer in layers:
        owner = owners.setdefault(aliases.get(layer.weight_key, layer.weight_key), layer)
        if owner is not layer and _shares_all(layer, owner, aliases):
            layer = replace(_reading_like(layer, owner, axes), tied_to=owner.key)
        marked.append(layer)
    return marked


def _shares_all(layer: Layer, owner: Layer, aliases: Mapping[str, str]) -> bool:
    """Whether every tensor of the weight is the owner's: a v with a g of its own makes another weight."""
    return layer.kind == owner.kind and all(
        role in owner.tensors
        and aliases.get(key, key) == aliases.get(owner.tensors[role], owner.tensors[role])
        for role, key in layer.tensors.items()
        if role in dialects.WEIGHT_ROLES
    )


def _reading_like(layer: Layer, owner: Layer, axes: Mapping[str, int]) -> Layer:
    """``layer`` with the owner's unit axis; a bias with another count of elements is then no part of it."""
    unit = owner.spec.unit
    if layer.spec.unit == unit:
        return layer
    named = next((pattern for pattern in axes if units.matches(layer.key, pattern)), None)
    if named is not None:
        raise SelectionError(
            f"--axis {named}={axes[named]}: the weight of '{layer.key}' is that of '{owner.key}', whose units are on axis"
            f" {unit.axis}: name the same axis for both"
        )
    spec, tensors = replace(layer.spec, unit=unit), dict(layer.tensors)
    if spec.bias_shape is not None and math.prod(spec.bias_shape) != spec.units:
        spec = replace(spec, bias_shape=None, bias_dtype=None)
        del tensors["bias"]
    return replace(layer, spec=spec, tensors=tensors, assumed_axis=owner.assumed_axis)
