"""How exactly the layers of a converted model give back the plain layers they were made of.

    ‖w' − w‖ / ‖w‖  of every unit,     w' decoded again in float64 from what the layer holds

With the scale outside, r is multiplied in. In unit norm w' is multiplied by the scale ‖v‖ + ε that was pushed on, and
w by those that were pushed in: W diag(s). A bias is compared with the running mean folded in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.checkpoint import dialects
from reparam.checkpoint.fidelity import ROW_ERROR_BAR, Fidelity
from reparam.errors import CheckFailedError
from reparam.graph.capture import capture
from reparam.graph.columns import linear_kind, scaled_columns
from reparam.graph.walk import linear_consumers
from reparam.layers import Reparameterized
from reparam.layers.mean_norm import folded
from reparam.layers.unit_norm import UnitNormForm

_NAMED = 16
# float32 holds no smaller norm or number to full precision: errors of such are relative to it.
_SMALLEST = torch.finfo(torch.float32).tiny


@torch.no_grad()
def compare_layers(plain: nn.Module, converted: nn.Module) -> dict[str, Fidelity]:
    """Decode every reparameterized layer of ``converted`` and compare.

    Args:
        plain: what it was made of, its modules under the same names.
        converted: any parameterization, means calibrated or not.

    Returns:
        By the key of the plain weight, how exactly it comes back.

    Raises:
        CheckFailedError: a row or bias is off by more than rounding, an exact zero did not survive, or a tensor of
            another module changed for no reason.
    """
    layers = {name: m for name, m in converted.named_modules() if isinstance(m, Reparameterized)}
    scaled = _scaled(plain, layers)
    found = {}
    for name, layer in layers.items():
        source = plain.get_submodule(name)
        for parameter in layer.held:
            key = dialects.join(name, parameter)
            weight = source._parameters[parameter]
            assert weight is not None
            bias = source._parameters.get(dialects.bias_key(parameter))
            try:
                found[key] = _compare(layer, parameter, scaled.get(source, weight.detach()), bias)
            except CheckFailedError as error:
                raise CheckFailedError(f"'{key}' {error}; nothing was written: please report this") from error
    for name, module in converted.named_modules():
        if isinstance(module, Reparameterized):
            continue
        source = plain.get_submodule(name)
        expected = {**source._buffers, **source._parameters}
        if source in scaled:
            expected["weight"] = scaled[source]
        for own, value in {**module._buffers, **module._parameters}.items():
            if not same_values(value, expected.get(own)):
                key = dialects.join(name, own)
                raise CheckFailedError(
                    f"'{key}' is not what it has to be; nothing was written: please report this"
                )
    return found


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, NaN where the other has NaN."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _scaled(plain: nn.Module, layers: dict[str, Reparameterized]) -> dict[nn.Module, Tensor]:
    """The weights of plain layers that take a scale which unit norm pushed on, with it."""
    if not any(isinstance(layer.form, UnitNormForm) for layer in layers.values()):
        return {}
    captured, found = capture(plain), {}
    for name, layer in layers.items():
        if not isinstance(layer.form, UnitNormForm):
            continue
        module = plain.get_submodule(name)
        kind, (call,) = linear_kind(module), captured.calls(module)
        assert kind is not None
        scale = layer.form.pushed_scale(layer.tensors()["weight_v"], layer.held["weight"].spec)
        consumers = linear_consumers(captured, call, len(scale), kind.channel, "positive scales")
        assert not isinstance(consumers, str)
        for consumer in consumers:
            assert isinstance(consumer.module.weight, Tensor)
            weight = scaled_columns(consumer.module, scale, consumer.repeat)
            found[consumer.module] = weight.to(consumer.module.weight.dtype)
    return found


def _compare(layer: Reparameterized, parameter: str, weight: Tensor, bias: Tensor | None) -> Fidelity:
    held, tensors = layer.held[parameter], layer.tensors(parameter)
    spec = held.spec
    again, bias_again = folded(layer, parameter)
    scale = torch.ones(spec.units, dtype=torch.float64, device=weight.device)
    if isinstance(layer.form, UnitNormForm):
        scale = layer.form.pushed_scale(tensors["weight_v"], spec)
    elif layer.scale_outside:
        scale = tensors["r"].double()
    rows = spec.unit.to_rows(weight.double())
    rows_again = spec.unit.to_rows(again) * scale[:, None]
    size = torch.linalg.vector_norm(rows, dim=1)
    _require(_row_error(rows_again - rows, size), ROW_ERROR_BAR[spec.stored], "row")
    rounded = spec.unit.from_rows(rows_again, spec.shape).to(weight.dtype)
    unequal = rounded != weight
    if (unequal & (weight == 0)).any():
        raise CheckFailedError("lost an exact zero")
    inexact = int(unequal.sum())
    where = unequal.flatten().nonzero()[:_NAMED, 0].tolist() if inexact else []
    error = _row_error(spec.unit.to_rows(rounded.double()) - rows, size) if inexact else 0.0
    bias_inexact = 0
    if bias_again is not None:
        assert held.bias_role is not None
        own = tensors[held.bias_role]
        bias_again = bias_again.double().flatten() * scale
        bias_inexact = _compare_bias(
            bias, bias_again, own, own.double().flatten() * _of_lambda(layer, parameter, scale)
        )
    return Fidelity(weight.numel(), spec.units, inexact, error, tuple(where), bias_inexact)


def _of_lambda(layer: Reparameterized, parameter: str, scale: Tensor) -> Tensor:
    """By what the stored bias is multiplied to be the plain one."""
    inside = layer.held[parameter].bias_role == "lambda_" and not layer.scale_outside
    return layer.tensors(parameter)["r"].double() if inside else scale


def _compare_bias(bias: Tensor | None, again: Tensor, own: Tensor, stored: Tensor) -> int:
    """How many biases do not come back bit for bit; one that was gained is compared with zero, and not counted."""
    expected = torch.zeros_like(again) if bias is None else bias.detach().double().flatten()
    # The stored bias holds the mean's part as well, and rounds with it.
    size = torch.maximum(expected.abs(), stored.abs()).clamp_min(_SMALLEST)
    worst = float(((again - expected).abs() / size).amax()) if size.numel() else 0.0
    # float64 is met up to the sum of the mean's part.
    _require(worst, max(torch.finfo(own.dtype).eps, ROW_ERROR_BAR["F64"]), "bias")
    return 0 if bias is None else int((again.to(bias.dtype) != bias.flatten()).sum())


def _row_error(difference: Tensor, size: Tensor) -> float:
    """Largest ‖difference‖ of a row over its ``size``."""
    if not len(size):
        return 0.0
    error = torch.linalg.vector_norm(difference, dim=1)
    return float((error / size.clamp_min(_SMALLEST)).amax())


def _require(error: float, bar: float, what: str) -> None:
    if not error <= bar:  # NaN is no pass
        raise CheckFailedError(f"came back with a {what} error of {error:.1e}, the bar is {bar:.1e}")
