"""What kind each parameter is, and with it how it is trained: its learning rate, its weight decay, or not at all.

| kind | parameters |
|---|---|
| theta, r, lambda_ | of GmP layers |
| g, v | of weight normalization; v of unit norm |
| weight, bias | of linear, convolutional, recurrent and attention layers; the bias of any layer that keeps one |
| other | all others: norms, embeddings, a model's own |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from reparam.errors import ReparamError
from reparam.layers import Reparameterized
from reparam.layers.kinds import kind_of, weight_names
from reparam.training.recipe import KINDS

if TYPE_CHECKING:
    from reparam.training.recipe import Recipe

#: decaying them would pull boundaries to the origin, directions to an axis, and functions to zero
_NEVER_DECAYED = frozenset({"theta", "r", "lambda_", "g", "bias"})


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of every parameter, in the order and under the names of ``model.named_parameters()``.

    The layer that holds it decides, not its name. One that layers share is what the reparameterized of them says, or
    else the plain one: an embedding tied to the output layer is a weight.
    """
    kinds: dict[int, str] = {}
    modules = list(model.modules())
    for told in (_held, _plain):
        for module in modules:
            for parameter, kind in told(module):
                kinds.setdefault(id(parameter), kind)
    return {name: kinds.get(id(p), "other") for name, p in model.named_parameters()}


def make_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: those that are trained, each once, by kind.

    Learning rates: ``recipe.lrs[kind]``, or ``recipe.angle_lr`` for theta, or ``recipe.lr``. Where no ``angle_lr`` is
    given it is ``lr`` for Adam and AdamW, whose steps do not depend on the gradient's size, and a tenth of it for SGD:
    a step on an angle moves the weight by up to r² times what the same rate moves a plain weight.
    Weight decay: on weight, v and other, except a norm's vectors; on all with ``recipe.decay_all``.

    Args:
        model: on its device already.
        recipe: its ``optimizer``, ``lr``, ``angle_lr``, ``lrs``, ``weight_decay`` and ``decay_all`` are read.

    Returns:
        Groups with "kind", "params", "lr" and "weight_decay", none empty; "other" may come twice.

    Raises:
        ReparamError: ``lrs`` names a kind the model has not, or all parameters are frozen.
    """
    kinds = parameter_kinds(model)
    _require(recipe.lrs, kinds, "--lrs")
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        kind = kinds[name]
        if not parameter.requires_grad:
            continue
        decayed = recipe.decay_all or not (
            kind in _NEVER_DECAYED or (kind == "other" and parameter.dim() < 2)
        )
        group = groups.setdefault(
            (kind, decayed),
            {
                "kind": kind,
                "params": [],
                "lr": _rate(kind, recipe),
                "weight_decay": recipe.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ReparamError(f"nothing to train: every parameter of the model is frozen ({_told(kinds)})")
    return [groups[key] for key in sorted(groups, key=lambda key: (KINDS.index(key[0]), key[1]))]


def freeze_except(model: nn.Module, kinds: Collection[str]) -> None:
    """Train only the parameters of some kinds (``--train r,lambda_``); what is frozen already stays so.

    Raises:
        ReparamError: the model has no parameter of a kind, or none that can be trained; nothing was changed.
    """
    found = parameter_kinds(model)
    _require(kinds, found, "--train")
    if not any(p.requires_grad for name, p in model.named_parameters() if found[name] in kinds):
        raise ReparamError(f"--train {','.join(kinds)}: nothing to train, they are frozen: {_told(found)}")
    for name, parameter in model.named_parameters():
        if found[name] not in kinds:
            parameter.requires_grad_(False)


def _held(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The parameters a reparameterized layer holds its weights and biases in."""
    if isinstance(module, Reparameterized):
        for name in module.held:
            for role, parameter in module.tensors(name).items():
                yield parameter, role.removeprefix("weight_")


def _plain(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The weights and biases of a layer in standard parameterization."""
    if kind_of(module) is not None:
        weights = weight_names(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and (name in weights or "bias" in name):
                yield parameter, "weight" if name in weights else "bias"


def _rate(kind: str, recipe: Recipe) -> float:
    if kind in recipe.lrs:
        return recipe.lrs[kind]
    if kind != "theta":
        return recipe.lr
    if recipe.angle_lr is not None:
        return recipe.angle_lr
    return recipe.lr / 10 if recipe.optimizer == "sgd" else recipe.lr


def _require(named: Iterable[str], kinds: dict[str, str], option: str) -> None:
    for kind in named:
        if kind not in kinds.values():
            raise ReparamError(f"{option} {kind}: the model has no such parameters: {_told(kinds)}")


def _told(kinds: dict[str, str]) -> str:
    return "it has " + (", ".join(kind for kind in KINDS if kind in kinds.values()) or "none at all")
