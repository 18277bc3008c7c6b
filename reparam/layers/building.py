"""Layers made from plain ones or from a file's records, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from reparam.checkpoint.metadata import LayerRecord
from reparam.dtypes import code_of, torch_dtype
from reparam.errors import ArchitectureError
from reparam.layers.form import Held
from reparam.layers.kinds import bias_name, weight_names
from reparam.layers.mean_norm import BUFFERS, MeanNorm, folded, input_weights
from reparam.layers.output_mean import OUTPUT_MEAN, OutputMean
from reparam.layers.part import GeometricPart
from reparam.parameterizations import UnitAxis, WeightSpec

if TYPE_CHECKING:
    from reparam.layers.base import Reparameterized

_Layer = TypeVar("_Layer", bound="Reparameterized")

#: what a reparameterized layer has beside its plain class's attributes
_STATE = ("held", "plain_names", "scale_outside", "mean", "gained_bias", "batched_only", "weight_cache")


def build_from_plain(cls: type[_Layer], module: nn.Module) -> _Layer:
    """See :meth:`Reparameterized.from_plain`."""
    made = {}
    for name in weight_names(module):
        weight, bias = _plain(module, name)
        stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
        spec = WeightSpec(
            shape=tuple(weight.shape),
            dtype=code_of(weight.dtype),
            unit=cls.kind.unit(module),
            bias_shape=None if bias is None else tuple(bias.shape),
            bias_dtype=None if bias is None else code_of(bias.dtype),
            stored=code_of(stored),
        )
        # A frozen bias under a trained weight would move as r·lambda: it is kept as it is.
        kept = bias is not None and weight.requires_grad and not bias.requires_grad
        with torch.no_grad():
            tensors = cls.form.decompose(
                weight.detach(),
                None if bias is None else bias.detach().clone(),
                spec,
                "bias" if kept else None,
            )
        made[name] = spec, {role: tensor.clone() for role, tensor in tensors.items()}
    return _build(cls, module, made)


def build_from_records(cls: type[_Layer], module: nn.Module, records: Mapping[str, LayerRecord]) -> _Layer:
    """See :meth:`Reparameterized.from_records`."""
    made = {}
    for name, record in records.items():
        weight, bias = _plain(module, name)
        _check(cls, record, weight, bias, cls.kind.unit(module))
        specs = cls.form.tensors(record.spec, record.bias)
        made[name] = (
            record.spec,
            {
                role: torch.zeros(shape, dtype=torch_dtype(code), device=weight.device)
                for role, (code, shape) in specs.items()
            },
        )
    return _build(cls, module, made)


def records_of(layer: Reparameterized) -> dict[str, LayerRecord]:
    """See :meth:`Reparameterized.records`."""
    inputs, mean = input_weights(layer), layer.mean
    if isinstance(behind := layer._modules.get(OUTPUT_MEAN), OutputMean):
        mean = MeanNorm("authors", behind.momentum)
    return {
        name: LayerRecord(
            layer.form.name,
            held.spec,
            held.bias_role,
            layer.scale_outside,
            mean.kind if mean is not None and name in inputs else None,
            mean.momentum if mean is not None and name in inputs else 0.01,
            layer.gained_bias and name in inputs,
        )
        for name, held in layer.held.items()
    }


def fold_layer(layer: Reparameterized, scale: Tensor | None) -> nn.Module:
    """See :meth:`Reparameterized.fold`."""
    parts = {name for name in layer.held if name in layer._modules}
    plain = _sibling(layer.plain_class, layer, drop=(*_STATE,))
    plain._modules = {k: copy.deepcopy(v) for k, v in layer._modules.items() if k not in parts}
    means = BUFFERS.values()
    plain._buffers = {k: v for k, v in plain._buffers.items() if k not in means}
    values: dict[str, nn.Parameter | None] = {}
    for name, held in layer.held.items():
        tensors = layer.tensors(name)
        with torch.no_grad():
            weight, bias = folded(layer, name)
            if scale is not None:
                weight = held.spec.unit.from_rows(
                    held.spec.unit.to_rows(weight) * scale.double()[:, None], held.spec.shape
                )
                bias = None if bias is None else bias.double() * scale.double().reshape(bias.shape)
        trained = any(tensors[role].requires_grad for role in held.roles if role != held.bias_role)
        values[name] = nn.Parameter(weight.to(held.dtype, copy=True), requires_grad=trained)
        if bias is not None and held.bias_role is not None:
            source = tensors[held.bias_role]
            dtype = source.dtype if held.bias_role == "bias" else held.dtype
            values[held.bias_name] = nn.Parameter(
                bias.to(dtype, copy=True), requires_grad=source.requires_grad
            )
    for name in layer.plain_names:
        plain._parameters[name] = values[name] if name in values else _copy(layer._parameters.get(name))
    if isinstance(plain, nn.RNNBase):
        plain._init_flat_weights()
    if layer.gained_bias:  # the user's class does not have it: files say so
        plain.gained_bias = True  # type: ignore[assignment]
    return plain


def _build(
    cls: type[_Layer], module: nn.Module, made: Mapping[str, tuple[WeightSpec, Mapping[str, Tensor]]]
) -> _Layer:
    layer = _sibling(cls, module, drop=("_flat_weights",))
    layer._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
    layer.plain_names = tuple(module._parameters)
    layer.held, layer.scale_outside, layer.mean = {}, False, None
    layer.gained_bias = bool(module.__dict__.get("gained_bias", False))
    if isinstance(module, nn.RNNBase):
        layer.__dict__["_flat_weight_refs"] = []
    for name, (spec, tensors) in made.items():
        weight, bias = _plain(module, name)
        role = next((role for role in tensors if role in ("lambda_", "bias")), None)
        held = Held(spec, weight.dtype, bias_name(name), role, tuple(tensors))
        layer.held[name] = held
        for role, tensor in tensors.items():
            source = bias if role in ("lambda_", "bias") else weight
            assert source is not None
            trained = source.requires_grad and not (role == "theta" and spec.fan_in == 1)
            dtype = source.dtype
            if role in cls.form.wide:
                dtype = torch.promote_types(tensor.dtype, torch.promote_types(dtype, torch.float32))
            part, key = (None, held.bias_name) if role == "bias" else cls.form.place(name, role)
            owner: nn.Module = layer
            if part is not None:
                owner = layer._modules.get(part) or GeometricPart(held)
                layer._modules[part] = owner
            # Not register_parameter: it refuses `bias`, which the layer has as a composed attribute.
            owner._parameters[key] = nn.Parameter(tensor.to(dtype), requires_grad=trained)
    taken = set(layer.held) | {held.bias_name for held in layer.held.values() if held.bias_role == "lambda_"}
    for name in layer.plain_names:
        if name not in taken and name not in layer._parameters:
            layer._parameters[name] = _copy(module._parameters[name])
    return layer


def _check(
    cls: type[Reparameterized], record: LayerRecord, weight: Tensor, bias: Tensor | None, unit: UnitAxis
) -> None:
    spec = record.spec
    if spec.shape != tuple(weight.shape):
        raise ArchitectureError(
            f"the file's weight is {list(spec.shape)}, the architecture's {list(weight.shape)}"
        )
    if (record.bias is None) != (bias is None):
        raise ArchitectureError(
            "the file's layer has no bias, the architecture's has"
            if record.bias is None
            else "the file's layer has a bias, the architecture's has none"
        )
    if record.bias == "lambda_" and cls.form.name != "gmp":
        raise ArchitectureError(f"the file's {record.kind} layer has a lambda_, which only GmP has")
    if spec.theta_origin != "equator":
        raise ArchitectureError(
            f"theta from the {spec.theta_origin} is not supported in {cls.plain_class.__name__}: "
            "`reparam convert` the file to sp and back"
        )
    # Weight normalization's norms run over the axes its g says, whichever axis counts units.
    if cls.form.name == "gmp" and (spec.unit.axis, spec.unit.groups) != (unit.axis, unit.groups):
        raise ArchitectureError(
            f"units on axis {spec.unit.axis} in {spec.unit.groups} groups, where {cls.plain_class.__name__} has "
            f"axis {unit.axis} and {unit.groups}: convert the file to sp and back, with --axis GLOB={unit.axis}"
        )


def _plain(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    weight = module._parameters.get(name)
    if weight is None:
        raise ArchitectureError(f"{type(module).__name__} has no parameter `{name}`")
    return weight, module._parameters.get(bias_name(name))


def _copy(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


_Any = TypeVar("_Any", bound=nn.Module)


def _sibling(cls: type[_Any], module: nn.Module, drop: tuple[str, ...] = ()) -> _Any:
    """A layer of another class with this one's hyperparameters, mode and hooks, and without parameters.

    The constructor is passed over: it would draw random weights, and assign them to what may be composed.
    """
    layer = cls.__new__(cls)
    state = {
        key: value.copy() if isinstance(value, (dict, list)) else value
        for key, value in module.__dict__.items()
        if key not in drop
    }
    layer.__dict__.update(state, _parameters={})
    return layer
