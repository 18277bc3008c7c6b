"""A graph computes what the forward pass computes, or there is none and the reason is told; the model is left alone."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from torch import Tensor, nn
from torch.nn import functional as F

from reparam import convert
from reparam.graph.capture import capture
from reparam.graph.rewritten import Rewritten


class Net(nn.Module):
    """Two layers and a way to run them."""

    scale = 4
    shape = (2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.feature: Any = None
        self.calls = 0
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))

    @property
    def width(self) -> int:
        return 4


class Optional(Net):
    def forward(self, x: Tensor, task: Any = None) -> Tensor:
        return self.a(x) if task is not None else self.b(x)


class Flagged(Net):
    def forward(self, x: Tensor, *, aux: bool = False) -> Tensor:
        return self.a(x) if aux is False else self.b(x)


class InTraining(Net):
    def forward(self, x: Tensor, task: Any = None) -> Tensor:
        return self.a(x) if self.training and task is None else self.b(x)


class Together(Net):
    def forward(self, x: Tensor, p: Any = None, q: Any = None) -> Tensor:
        return self.b(x) if p is not None or q is not None else self.a(x)


class TypeOfInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x / 2 if isinstance(x, Tensor) else x)


class TypeOfShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if isinstance(x.shape, tuple) else self.b(x)


class SetsData(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.data = h * 2
        return self.b(h)


class Stores(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.a(x)
        return self.b(self.feature)


class Counts(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x))


class Collects(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.a(x))
        return self.b(self.seen[-1])


class Switches(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.b.training = not self.b.training
        return self.b(self.a(x))


STORES = "its forward pass stores values on the model"
TYPE = "its forward pass asks for the type of a value, or stores the value on the model"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Optional, "what Optional computes depends on its optional argument `task`"),
        (Flagged, "what Flagged computes depends on its optional argument `aux`"),
        (InTraining, "what InTraining computes depends on its optional argument `task`"),
        (Together, "what Together computes depends on its optional arguments `p`, `q`"),
        (TypeOfInput, f"torch.fx cannot trace TypeOfInput: {TYPE}"),
        (TypeOfShape, f"torch.fx cannot trace TypeOfShape: {TYPE}"),
        (SetsData, "torch.fx cannot trace SetsData: its forward pass sets the attribute `data` of a tensor"),
        (Stores, f"torch.fx cannot trace Stores: {TYPE}"),
        (Counts, f"torch.fx cannot trace Counts: {STORES}"),
        (Collects, f"torch.fx cannot trace Collects: {STORES}"),
        (Switches, f"torch.fx cannot trace Switches: {STORES}"),
    ],
)
def test_there_is_no_graph_of_what_it_would_not_hold(make: Callable[[], Net], why: str) -> None:
    model = make()
    found = capture(model)
    assert found.graph is None
    assert found.untraceable == why
    assert (model.feature, model.calls, model.seen) == (None, 0, [])
    assert all(module.training for module in model.modules())


def test_a_layer_with_another_forward_pass_is_named() -> None:
    model = Net()
    model.a.forward = lambda x: F.linear(x, model.a.weight) * 2  # type: ignore[method-assign]
    why = "torch.fx cannot trace Net: the forward pass of `a` was replaced by an attribute"
    assert capture(model).untraceable == why


class Passes(Net):
    """Optional arguments that choose nothing, whatever becomes of them."""

    def forward(self, x: Tensor, factor: float = 2.0, unused: Any = None, *, shift: float = 0.5) -> Tensor:
        return F.dropout(self.a(x), 0.5, False) * factor + shift


def test_optional_arguments_that_are_only_passed_on() -> None:
    assert capture(Passes()).untraceable is None


class Merging(Net):
    """Its train() does more than to set the mode, as adapters do that merge their weights for evaluation."""

    def train(self, mode: bool = True) -> Merging:
        with torch.no_grad():
            self.a.weight += 1.0 if mode else -1.0
        return super().train(mode)


def test_the_users_train_is_not_called() -> None:
    model = Merging()
    before = copy.deepcopy(model.state_dict())
    assert capture(model).untraceable is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Aliased(Net):
    """Other names of the tensor see the change."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        k, turned = h, h.T
        h += 1
        turned -= 3
        return self.b(torch.cat([k, h * 2])[: len_of(x)])


def len_of(x: Tensor) -> Any:
    return x.size(0)


class AliasedAttribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        turned = h.T
        turned *= 3
        return self.b(h)


class Numbers(Net):
    """Other names of a number do not."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        before = n
        n += 1
        n //= 2
        return self.b(F.relu(self.a(x))) * before + n


class Reshapes(Net):
    """Functions of torch look at the types of sizes."""

    def forward(self, x: Tensor) -> Tensor:
        n, h = x.size(0), F.relu(self.a(x))
        return self.b(torch.reshape(torch.reshape(h, (n, -1)), shape=(n, x.shape[1])))


@pytest.mark.parametrize("make", [Aliased, AliasedAttribute, Numbers, Reshapes])
def test_updates_in_place_reach_the_other_names_of_tensors_alone(make: Callable[[], Net]) -> None:
    plain, x = randomized(make()), noise(4, 4)
    found = capture(plain)
    assert found.graph is not None
    rewritten = Rewritten.of(copy.deepcopy(plain), found.graph)
    assert difference(rewritten, plain, x) == 0.0
    assert difference(pickle.loads(pickle.dumps(rewritten)), plain, x) == 0.0
    again = capture(rewritten)
    assert any(n.target in (operator.iadd, operator.imul, torch.reshape) for n in again.nodes())
    assert difference(Rewritten.of(copy.deepcopy(rewritten), again.graph), plain, x) == 0.0
    converted = convert(plain, "gmp", include=["a"])
    assert isinstance(converted, Rewritten)
    assert difference(converted, plain, x) <= EXACT


def test_data_of_the_class_are_found_on_a_rewritten_model() -> None:
    model: Any = convert(randomized(Net()), "gmp", include=["a"])
    assert isinstance(model, Rewritten)
    assert (model.scale, model.shape) == (4, (2, 3))
    with pytest.raises(AttributeError, match=r"Net\.width: only the forward pass was rewritten"):
        _ = model.width
