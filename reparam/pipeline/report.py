"""What the conversion of a whole model did: every layer, and every rule at every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reparam.checkpoint.report import ConversionReport, LayerReport

if TYPE_CHECKING:
    from torch import nn

    from reparam.checkpoint.fidelity import Fidelity
    from reparam.graph import Outcome
    from reparam.pipeline.outputs import OutputsCompared


@dataclass(frozen=True)
class ModelReport(ConversionReport):
    """A :class:`ConversionReport`, and what the rules did.

    Attributes:
        rules: every rule at every layer it was tried on, in that order.
        outputs: how the outputs of both networks compare; None where no inputs were at hand.
        rewritten: the model has scales after activations: its own class no longer computes the same.
    """

    rules: tuple[Outcome, ...]
    outputs: OutputsCompared | None
    rewritten: bool

    def to_json(self) -> dict[str, Any]:
        rules = [{"rule": o.rule, "layer": o.layer, "applied": o.applied, "why": o.why} for o in self.rules]
        outputs = None if self.outputs is None else asdict(self.outputs)
        return {**super().to_json(), "rules": rules, "outputs": outputs, "rewritten": self.rewritten}


def describe_layers(
    before: nn.Module, after: nn.Module, rules: Sequence[Outcome], fidelity: Mapping[str, Fidelity]
) -> tuple[tuple[LayerReport, ...], dict[str, str]]:
    """What became of every weight of a layer; and by key, what the other tensors of ``after`` are.

    Args:
        before: the model as it was read.
        after: its modules under the same names.
        rules: what was done.
        fidelity: by the key of the plain weight, how exactly it comes back.
    """
    from reparam.layers import Reparameterized, layer_class
    from reparam.layers.kinds import KINDS

    layers: list[LayerReport] = []
    others: dict[str, str] = {}
    for name, module in after.named_modules():
        source = before.get_submodule(name)
        if (
            isinstance(module, Reparameterized)
            or layer_class("gmp", type(module)) is not None
            or any(isinstance(module, plain) for plain in KINDS)
        ):
            layers += _describe(name, source, module, [o for o in rules if o.layer == name], fidelity)
            continue
        for key in (*module._parameters, *(module._buffers.keys() - module._non_persistent_buffers_set)):
            if module._parameters.get(key) is not None or module._buffers.get(key) is not None:
                others[f"{name}.{key}" if name else key] = (
                    f"of {type(module).__name__}, no layer that is converted"
                )
    return tuple(layers), others


def _describe(
    name: str,
    source: nn.Module,
    module: nn.Module,
    rules: Sequence[Outcome],
    fidelity: Mapping[str, Fidelity],
) -> list[LayerReport]:
    from reparam.checkpoint import dialects
    from reparam.dtypes import code_of
    from reparam.layers import Reparameterized
    from reparam.layers.kinds import KINDS, bias_name, weight_names

    done = [o.why for o in rules if o.applied]
    refused = [o.why for o in rules if not o.applied]
    held_before = source.held if isinstance(source, Reparameterized) else {}
    if isinstance(module, Reparameterized):
        names, target = tuple(module.held), module.form.name
    else:
        names, target = weight_names(module), "sp"
    changed = bool(held_before) or target != "sp" or not _same(source, module)
    if changed:
        status, reason = "converted", "; ".join(done) or "takes the scale that unit norm pushed on"
    elif refused:
        status, reason = "skipped", refused[-1]
    else:
        status, reason = "copied", f"already {target}"
    found = []
    for weight in names:
        key = dialects.join(name, weight)
        if isinstance(module, Reparameterized):
            held = module.held[weight]
            shape, dtype, bias, axis = held.spec.shape, held.spec.dtype, held.bias_role, held.spec.unit.axis
        else:
            value = module._parameters[weight]
            assert value is not None
            shape, dtype = tuple(value.shape), code_of(value.dtype)
            bias = "bias" if module._parameters.get(bias_name(weight)) is not None else None
            axis = KINDS[type(module)].unit(module).axis if type(module) in KINDS else 0
        form = source.form.name if isinstance(source, Reparameterized) and weight in held_before else "sp"
        found.append(
            LayerReport(
                dialects.layer_name(key), key, form, target, status, reason, shape, dtype, fidelity.get(key), bias,
                axis, assumed_axis=False,
            )
        )  # fmt: skip
    return found


def _same(source: nn.Module, module: nn.Module) -> bool:
    """Whether a plain layer has the parameters it had."""
    from reparam.graph.comparing import same_values

    before, after = dict(source.named_parameters()), dict(module.named_parameters())
    return before.keys() == after.keys() and all(same_values(before[k], after[k]) for k in after)
