"""Folding a model that has a converted one among its modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fold_cases import CASES, Block, placed
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import moved, tensors, why
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.graph import fold
from reparam.graph.outcome import Outcome
from reparam.graph.rewritten import Rewritten
from reparam.layers import Reparameterized


class Outer(nn.Module):
    """A model with a converted one inside, which ``run`` runs."""

    def __init__(self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.last, self.run = inner, randomized(nn.Conv2d(4, 4, 3, padding=1)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


OUTER: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "traceable": lambda m, x: m.last(m.inner(x)),
    "called twice": lambda m, x: m.last(m.inner(x)) + m.inner(x * 2),
    "untraceable": lambda m, x: m.last(m.inner(x)) if x.sum() > -1e9 else x,
}


@pytest.mark.parametrize("run", OUTER)
@pytest.mark.parametrize("joined", ["convs", "residual", "output"])
def test_a_converted_model_inside_another(joined: str, run: str) -> None:
    """Folded where it stands: signs go into its own layers, those that leave it stay."""
    inner = randomized(Block(joined))
    model, x = Outer(moved(placed(inner)), OUTER[run]).eval(), noise(2, 2, 5, 5)
    before, report = tensors(model), list[Outcome]()
    folded = fold(model, report)
    assert difference(folded, model, x) <= EXACT
    assert not any(isinstance(module, Reparameterized) for module in folded.modules())
    signs = {"inner.conv1_sign"} if joined != "convs" else set()
    assert type(folded.inner) is Block if joined == "convs" else isinstance(folded.inner, Rewritten)
    assert set(folded.state_dict()) - {f"inner.{key}" for key in inner.state_dict()} - signs == {
        "last.weight", "last.bias",
    }  # fmt: skip
    assert ("signs pushed into `conv2`" in why(report, "inner.conv1")) == (joined == "convs")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_signs_stay_where_a_layer_outside_shares_the_consumer() -> None:
    model, x = (
        Outer(moved(placed(randomized(Block("convs")), "conv1")), OUTER["traceable"]).eval(),
        noise(2, 2, 5, 5),
    )
    model.last.weight = model.inner.conv2.weight
    report: list[Outcome] = []
    folded = fold(model, report)
    assert "one multiplication remains, `conv2` shares parameters with layers outside" in why(
        report, "inner.conv1"
    )
    assert folded.last.weight is folded.inner.conv2.weight
    assert difference(folded, model, x) <= EXACT


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda m, x: m.last(m.inner.conv1(x) + m.inner(x)), "`inner.conv1`: its scale stands outside of the layer"),
        (lambda m, x: m.last(m.inner(x)) * m.inner.conv2.weight.sum(), "`inner.conv2.weight` is read outside of `inner`"),
    ],
)  # fmt: skip
def test_layers_that_are_used_from_outside_of_what_was_converted(
    run: Callable[[nn.Module, Tensor], Tensor], says: str
) -> None:
    model = Outer(moved(placed(randomized(Block("convs")), "conv1")), run).eval()
    with pytest.raises(ReparamError) as caught:
        fold(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_that_are_somewhere_else() -> None:
    model = moved(placed(CASES["output"].build()))
    with pytest.raises(ReparamError, match="`a`: its scale stands outside of the layer") as caught:
        fold(nn.ModuleDict({"a": model.conv1}))
    assert "\n" not in str(caught.value)
