"""Exchange the parameterization of layers; what each computes stays.

    Conv2d(weight, bias)  →  GmPConv2d(r, theta, lambda_)     w = r·u(θ), b = r·λ
                          →  WeightNormConv2d(weight_g, weight_v, bias)     w = g·v/‖v‖

Layers that share a weight share its tensors afterwards.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.utils import parametrize

from reparam.checkpoint.dialects import WEIGHT_ROLES
from reparam.errors import ReparamError
from reparam.graph.inplace import become, named_layers, sharers
from reparam.graph.outcome import Outcome
from reparam.layers import Reparameterized, layer_class
from reparam.layers.kinds import KINDS, bias_name, class_name, weight_names

RULE = "swap"


def swap_layers(model: nn.Module, form: str, names: Collection[str]) -> list[Outcome]:
    """Bring plain layers into a parameterization, in place.

    Args:
        model: changed in place; it need not trace.
        form: "gmp" or "wn".
        names: of the layers, as in ``named_modules``; one under two names is exchanged once.

    Returns:
        One outcome a layer, in the order of ``named_modules``.

    Raises:
        ReparamError: the model has no module of a name.
        NonFiniteError: a weight is NaN or Inf.
    """
    chosen = named_layers(model, names)
    outcomes: dict[nn.Module, Outcome] = {}
    made: dict[nn.Module, Reparameterized] = {}
    first: dict[tuple[int, ...], tuple[nn.Module, str]] = {}
    for module, name in chosen.items():
        reason = unfit(module, form) or _shared(model, module, chosen, form)
        if reason is not None:
            outcomes[module] = Outcome(RULE, name, False, reason)
            continue
        cls = layer_class(form, type(module))
        assert cls is not None
        try:
            layer = cls.from_plain(module)
        except ReparamError as error:
            raise type(error)(f"`{name}`: {error}") from error
        # Its children are the ones that others hold and that may be exchanged themselves, not copies.
        layer._modules.update({child: m for child, m in module._modules.items() if child in layer._modules})
        weights = tuple(id(module._parameters[weight]) for weight in layer.held)
        owner, owner_name = first.setdefault(weights, (module, name))
        why = f"{class_name(type(module))} is {class_name(type(layer))}"
        if owner is not module:
            share(made[owner], layer)
            why += f", sharing its weight with `{owner_name}`"
        made[module] = layer
        outcomes[module] = Outcome(RULE, name, True, why)
    for module, layer in made.items():
        become(module, layer)
    return list(outcomes.values())


def unfit(module: nn.Module, form: str) -> str | None:
    """Why a module cannot be a layer of this parameterization, None where it can."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return (
            "it is parametrized by torch: call torch.nn.utils.parametrize.remove_parametrizations, "
            "or load its state_dict from a file"
        )
    if layer_class(form, type(module)) is None:
        plain = next((cls for cls in KINDS if isinstance(module, cls)), None)
        if plain is not None:
            return (
                f"{type(module).__name__} is a class of its own beyond {plain.__name__}: "
                "it may compute something else"
            )
        return f"{type(module).__name__} is no layer that holds weights"
    if not weight_names(module) or any(name.endswith("_v") for name in module._parameters):
        return (
            "its weight is computed by a hook of torch.nn.utils (weight norm, spectral norm, pruning): "
            "remove it first"
        )
    return None


def share(owner: Reparameterized, layer: Reparameterized) -> None:
    """Have ``layer`` hold its weight in the parameters ``owner`` holds the same weight in; biases stay their own."""
    for name in layer.held:
        for role, parameter in owner.tensors(name).items():
            if role in WEIGHT_ROLES:
                part, key = layer.form.place(name, role)
                holder = layer if part is None else layer._modules[part]
                assert holder is not None
                holder._parameters[key] = parameter


def _shared(model: nn.Module, module: nn.Module, chosen: Collection[nn.Module], form: str) -> str | None:
    """Why a layer that shares parameters must stay as it is, None where they can be shared afterwards too."""
    own = dict(module.named_parameters(recurse=False))
    biases = [p for name, p in own.items() if name in {bias_name(w) for w in weight_names(module)}]
    if others := sharers(model, module, biases):
        return f"its bias is shared with {others}"
    for other in model.modules():
        if other is module or not any(p is q for p in own.values() for q in other._parameters.values()):
            continue
        names = weight_names(module)
        alike = type(other) is type(module) and [id(own[n]) for n in names] == [
            id(other._parameters.get(n)) for n in names
        ]
        if not alike or other not in chosen or unfit(other, form) is not None:
            others = sharers(model, module, list(own.values()))
            if not alike or unfit(other, form) is not None:
                return f"its weight is shared with {others} ({type(other).__name__}), which cannot share it converted"
            return f"its weight is shared with {others}: include both, or neither"
    return None
