"""Where a scale cannot stand after an activation: it stays inside, and the reason is told."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import (
    Twice,
    a_net,
    applied,
    placed,
    sequential,
    to_gmp,
    why,
)
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.graph.rules.scale import place_scales


class Branch(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.relu(y) + y


class Statement(Twice):
    """In place, as a statement: the activation's result is read under the name of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        F.relu_(y)
        return y + 1


class Residual(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x) + x)


class Reading(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x)) + self.fc.weight.sum()


class ReadingR(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.fc(x))
        return y + self.fc.r.sum() if hasattr(self.fc, "r") else y


class Slope(Twice):
    """The layer's output is the slope, not what is activated."""

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.fc(x)[0])


class BothArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return F.prelu(y, y)


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x)) if x.sum() > 0 else x


class WithoutGrad(Twice):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.fc(x)
        return self.relu(y)


class TrainsItsOwnWay(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))

    def train(self, mode: bool = True) -> TrainsItsOwnWay:
        super().train(mode)
        self.fc.train(False)
        return self


def one(activation: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(OrderedDict(fc=nn.Linear(3, 3), act=activation))


REFUSED = {
    "gelu": (one(nn.GELU()), "GELU follows it, which is no positively homogeneous activation"),
    "relu6": (one(nn.ReLU6()), "ReLU6 follows it"),
    "silu": (one(nn.SiLU()), "SiLU follows it"),
    "norm": (one(nn.LayerNorm(3)), "LayerNorm follows it"),
    "alpha dropout": (one(nn.AlphaDropout()), "AlphaDropout follows it"),
    "nothing": (one(nn.Identity()), "no activation follows it"),
    "twice": (Twice, "called 2 times"),
    "branch": (Branch, "its output goes to `relu` and `add`"),
    "statement": (Statement, "its output goes to `relu_` and `add`"),
    "residual": (Residual, "add follows it"),
    "weight read": (Reading, "a tensor that is no input, parameter or buffer"),
    "scale read": (ReadingR, "read outside of its call"),
    "slope": (Slope, "getitem follows it"),
    "slope and input": (BothArguments, "prelu follows it"),
    "untraceable": (Branching, "torch.fx cannot trace Branching"),
    "no_grad": (WithoutGrad, "switches gradients off"),
    "train": (TrainsItsOwnWay, "TrainsItsOwnWay overrides `train` of nn.Module"),
    "in a leaf": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4)), "does not show its call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot_stand_it_stays_inside(name: str) -> None:
    build, reason = REFUSED[name]
    model = to_gmp(randomized(build()))
    same, outcomes = place_scales(model)
    assert same is model
    assert applied(outcomes) == set()
    assert all(not layer.scale_outside for layer in model.modules() if hasattr(layer, "scale_outside"))
    assert all(reason in outcome.why for outcome in outcomes), outcomes
    assert all("\n" not in outcome.why for outcome in outcomes)
    assert outcomes


def test_a_pool_that_returns_more_or_is_watched() -> None:
    for pool in (nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2)):
        plain, x = sequential(conv=nn.Conv2d(2, 4, 3), relu=nn.ReLU(), pool=pool), noise(2, 2, 8, 8)
        seen: list[Tensor] = [torch.zeros(1)] * 2
        if not pool.return_indices:
            seen.clear()
            pool.register_forward_hook(lambda m, args, out, to=seen: to.append(args[0]))
        model, outcomes = place_scales(to_gmp(plain))
        assert why(outcomes, "conv") == "after `relu`"
        assert difference(model, plain, x) <= EXACT
        assert torch.allclose(seen[0], seen[1], rtol=EXACT, atol=EXACT)


def test_values_that_forbid_it() -> None:
    negative, mean, kept = to_gmp(a_net()), to_gmp(a_net()), a_net()
    with torch.no_grad():
        negative.conv1.r[1] = -1.0
        negative.conv2.r[1] = 0.0
        kept.conv1.weight[0] = 0.0
    mean.conv1.normalize_mean()
    for model, reason in (
        (negative, "1 of its r are negative"),
        (mean, "place the scale before normalizing the mean"),
        (to_gmp(kept), "without usable lambda"),
    ):
        x, before = noise(2, 2, 8, 8), copy.deepcopy(model)
        model, outcomes = place_scales(model)
        assert reason in why(outcomes, "conv1")
        assert applied(outcomes) == {"conv2"}
        assert difference(model, before, x) <= EXACT
    again, outcomes = place_scales(model)
    assert again is model
    assert "stands after the activation already" in why(outcomes, "conv2")


def test_hooks() -> None:
    calls: list[str] = []
    reached = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)))
    for hooked, reason in (
        ("0", "the hooks of `0` would not run any more"),
        ("0.0", "hooks of the layer see its output"),
        ("0.1", "hooks of `0.1` see values"),
    ):
        model = to_gmp(reached)
        model.get_submodule(hooked).register_forward_hook(lambda m, args, out: calls.append("hook"))
        assert reason in why(place_scales(model)[1], "0.0")
    model = to_gmp(reached.double())
    model[0][2].register_forward_hook(lambda m, args, out: calls.append("pool"))
    model.register_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    x, calls[:] = noise(1, 2, 8, 8), []
    model, outcomes = place_scales(model)
    assert why(outcomes, "0.0") == "after `0.1`"
    model(x)
    assert calls == ["pool", "RewrittenSequential"]


def test_a_forward_pass_replaced_by_an_attribute() -> None:
    model = to_gmp(a_net())
    model.forward = lambda x: x
    assert "replaced by an attribute" in why(place_scales(model)[1], "conv1")


def test_a_rewritten_part_of_another_model() -> None:
    outer = nn.Sequential(placed(to_gmp(a_net())), to_gmp(nn.Conv2d(3, 3, 1).double()), nn.ReLU())
    assert "`0` is rewritten already" in why(place_scales(outer)[1], "1")
