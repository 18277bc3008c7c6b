"""Parameters by kind: which layer holds them decides, and how each kind is trained."""

from __future__ import annotations

import re

import pytest
import torch
from layer_cases import KINDS as LAYERS
from layer_cases import plain_layer
from torch import nn

from reparam import convert
from reparam.errors import ReparamError
from reparam.layers import layer_class
from reparam.training.groups import freeze_except, make_groups, parameter_kinds
from reparam.training.recipe import KINDS, Recipe


class Net(nn.Module):
    """Names that mislead: a parameter of its own called theta, a norm whose weight and bias are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.r = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.theta = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(4, 6, bias=False)


def net(form: str | None) -> Net:
    torch.manual_seed(0)
    model = Net()
    if form is not None:
        model.r = layer_class(form, nn.Linear).from_plain(model.r)
    return model


PLAIN = {
    "embed.weight": "other",
    "norm.weight": "other",
    "norm.bias": "other",
    "theta": "other",
    "head.weight": "weight",
}
HELD = {
    None: {"r.weight": "weight", "r.bias": "bias"},
    "gmp": {"r.r": "r", "r.theta": "theta", "r.lambda_": "lambda_"},
    "wn": {"r.weight_g": "g", "r.weight_v": "v", "r.bias": "bias"},
    "unit": {"r.weight_v": "v", "r.bias": "bias"},
}


@pytest.mark.parametrize("form", HELD)
def test_the_layer_tells_the_kind_not_the_name(form: str | None) -> None:
    model = net(form)
    assert parameter_kinds(model) == PLAIN | HELD[form]
    assert list(parameter_kinds(model)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("form", [None, "gmp", "wn"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_kind(kind: str, form: str | None) -> None:
    model = plain_layer(kind)
    expected = {name: "bias" if "bias" in name else "weight" for name, _ in model.named_parameters()}
    if form is not None:
        model = layer_class(form, type(model)).from_plain(model)
        kinds = {"weight_g": "g", "weight_v": "v"}
        held = {
            id(p): kinds.get(role, role) for name in model.held for role, p in model.tensors(name).items()
        }
        expected = {n: held.get(id(p)) or expected[n] for n, p in model.named_parameters()}
    assert parameter_kinds(model) == expected
    assert set(expected.values()) <= set(KINDS)


def test_a_layer_that_keeps_its_bias_has_no_lambda() -> None:
    plain = nn.Linear(3, 2)
    with torch.no_grad():
        plain.weight[0] = 0
    assert parameter_kinds(layer_class("gmp", nn.Linear).from_plain(plain)) == {
        "r": "r",
        "theta": "theta",
        "bias": "bias",
    }


def test_subclasses_of_plain_layers_are_plain() -> None:
    class Standardized(nn.Conv2d):
        pass

    assert parameter_kinds(Standardized(3, 4, 2)) == {"weight": "weight", "bias": "bias"}


@pytest.mark.parametrize("form", [None, "wn"])
def test_tied_parameters_are_in_one_group_once(form: str | None) -> None:
    model = net(form)
    model.embed.weight = nn.Parameter(torch.randn(6, 4))
    model.head.weight = model.embed.weight
    assert parameter_kinds(model)["embed.weight"] == "weight"
    groups = make_groups(model, Recipe())
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    torch.optim.SGD(groups)  # refuses, with a warning that is an error here, what comes twice


def test_rates_and_decay_by_kind() -> None:
    model = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)), to="gmp")
    recipe = Recipe(lr=0.1, weight_decay=0.5, lrs={"r": 0.3})
    found = {
        (group["kind"], tuple(p.dim() for p in group["params"])): (group["lr"], group["weight_decay"])
        for group in make_groups(model, recipe)
    }
    assert found == {
        ("theta", (2,)): (0.1 / 10, 0.0),
        ("r", (1,)): (0.3, 0.0),
        ("lambda_", (1,)): (0.1, 0.0),
        ("weight", (2,)): (0.1, 0.5),
        ("bias", (1,)): (0.1, 0.0),
        ("other", (1, 1)): (0.1, 0.0),
    }
    for group in make_groups(model, recipe.model_copy(update={"decay_all": True})):
        assert group["weight_decay"] == 0.5
    kinds = [group["kind"] for group in make_groups(net("wn"), Recipe(weight_decay=0.5))]
    assert kinds == ["g", "v", "weight", "bias", "other", "other"]
    decays = [group["weight_decay"] for group in make_groups(net("wn"), Recipe(weight_decay=0.5))]
    assert decays == [0.0, 0.5, 0.5, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({"optimizer": "sgd"}, 0.002),
        ({"optimizer": "adam"}, 0.02),
        ({"optimizer": "adamw"}, 0.02),
        ({"optimizer": "sgd", "angle_lr": 0.7}, 0.7),
        ({"optimizer": "adam", "angle_lr": 0.0}, 0.0),
        ({"optimizer": "sgd", "lrs": {"theta": 0.6}}, 0.6),
    ],
)
def test_the_rate_of_angles(fields: dict[str, object], rate: float) -> None:
    first, *_ = make_groups(net("gmp"), Recipe(lr=0.02, **fields))
    assert (first["kind"], first["lr"]) == ("theta", rate)


def test_what_is_frozen_is_left_out() -> None:
    single = layer_class("gmp", nn.Linear).from_plain(nn.Linear(1, 3))  # its direction is a sign
    assert [group["kind"] for group in make_groups(single, Recipe())] == ["r", "lambda_"]
    for parameter in single.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(
        ReparamError, match=re.escape("every parameter of the model is frozen (it has theta, r, lambda_)")
    ):
        make_groups(single, Recipe())
    with pytest.raises(ReparamError, match="it has none at all"):
        make_groups(nn.ReLU(), Recipe())


def test_training_some_kinds_alone() -> None:
    model = net("gmp")
    model.r.r.requires_grad_(False)
    freeze_except(model, ("r", "lambda_", "weight"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"r.lambda_", "head.weight"}


def test_a_kind_the_model_has_not() -> None:
    model = net("gmp")
    with pytest.raises(
        ReparamError,
        match=r"^--train g: the model has no such parameters: it has theta, r, lambda_, weight, other$",
    ):
        freeze_except(model, ("r", "g"))
    with pytest.raises(ReparamError, match=r"^--lrs v: the model has no such parameters: it has theta, "):
        make_groups(model, Recipe(lrs={"v": 0.1}))
    assert all(p.requires_grad for p in model.parameters())
    single = layer_class("gmp", nn.Linear).from_plain(nn.Linear(1, 3))
    with pytest.raises(ReparamError, match="--train theta: nothing to train, they are frozen"):
        freeze_except(single, ("theta",))
    assert single.r.requires_grad
