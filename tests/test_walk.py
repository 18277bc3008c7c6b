"""From a layer's units to the columns they feed: what may stand between, and whose columns they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, noise, outputs, randomized
from layer_cases import SINGLE, inputs, plain_layer
from torch import Tensor, nn

from reparam.graph.capture import capture
from reparam.graph.columns import input_channels, linear_kind, scale_columns, scaled_columns
from reparam.graph.walk import linear_consumers
from reparam.layers import layer_class


@pytest.mark.parametrize("case", SINGLE)
def test_scaled_columns_take_the_place_of_a_scaled_input(case: str) -> None:
    layer, (x,) = plain_layer(case), inputs(case)
    channel = linear_kind(layer).channel
    channels = x.shape[channel]
    assert (
        input_channels(layer) == input_channels(layer_class("gmp", type(layer)).from_plain(layer)) == channels
    )
    scale = noise(channels, seed=7)
    (expected,) = outputs(layer, x * scale.reshape(-1, *(1,) * (-1 - channel)))
    scale_columns(layer, scale)
    torch.testing.assert_close(outputs(layer, x)[0], expected, rtol=EXACT, atol=EXACT)


def test_columns_behind_a_flattening() -> None:
    layer, x, scale = randomized(nn.Linear(12, 5)), noise(3, 4, 3), noise(4, seed=7)
    (expected,) = outputs(layer, (x * scale[:, None]).flatten(1))
    scale_columns(layer, scale, repeat=3)
    torch.testing.assert_close(outputs(layer, x.flatten(1))[0], expected, rtol=EXACT, atol=EXACT)


def test_columns_are_computed_in_float64_and_rounded_once() -> None:
    layer = randomized(nn.Conv2d(4, 6, 1, groups=2)).half()
    scale = noise(4, seed=7)
    columns = torch.cat([scale[:2].expand(3, 2), scale[2:].expand(3, 2)])[..., None, None]
    expected = layer.weight.detach().double() * columns
    assert torch.equal(scaled_columns(layer, scale), expected)
    scale_columns(layer, scale)
    assert torch.equal(layer.weight, expected.half())


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1), nn.BatchNorm1d(2)])
def test_other_modules_are_not_linear(module: nn.Module) -> None:
    assert linear_kind(module) is None


def walked(*between: nn.Module, through: Any) -> list[tuple[str, int]] | str:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), *between, nn.Flatten(), nn.Linear(4 * 6, 2))
    captured = capture(model)
    (call,) = captured.calls(model[0])
    found = linear_consumers(captured, call, 4, -3, through)
    return found if isinstance(found, str) else [(str(c.node.target), c.repeat) for c in found]


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1)]
)
def test_positive_scales_pass_where_signs_do_not(between: nn.Module) -> None:
    assert walked(between, through="positive scales") == [("3", 6)]
    reason = walked(between, through="signs")
    assert reason == f"`1` ({type(between).__name__}) takes its output, and signs cannot be moved past that"


@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.Dropout(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 3))]
)
@pytest.mark.parametrize("through", ["signs", "positive scales"])
def test_linear_operations_let_both_pass(between: nn.Module, through: str) -> None:
    assert walked(between, through=through) == [("3", 6)]


@pytest.mark.parametrize(
    "between",
    [nn.ReLU6(), nn.GELU(), nn.ELU(), nn.Sigmoid(), nn.AlphaDropout(), nn.Flatten(2), nn.AvgPool3d(1)],
)
def test_nothing_passes_other_operations(between: nn.Module) -> None:
    assert f"`1` ({type(between).__name__}) takes its output" in walked(between, through="positive scales")


@pytest.mark.parametrize(
    ("first", "axis", "features"),
    [
        (nn.Conv2d(2, 4, 3), -3, 30),  # no multiple of the units
        (nn.Linear(3, 4), -1, 8),  # (N, 2, 4) flattened: the units are not outermost
    ],
)
def test_features_that_are_not_runs_of_the_units(first: nn.Module, axis: int, features: int) -> None:
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(features, 2))
    captured = capture(model)
    (call,) = captured.calls(model[0])
    reason = linear_consumers(captured, call, 4, axis, "signs")
    assert reason == "`2` (Linear) does not take its units as input channels"


def test_views_are_flattenings_where_their_samples_are_those_of_the_viewed() -> None:
    assert viewed(lambda m, x, y: y.view(y.size(0), -1)) == 1
    assert viewed(lambda m, x, y: y.flatten(1).view(x.shape[0], 24)) == 1
    assert viewed(lambda m, x, y: y.reshape((m.bn(m.other(x)).size(dim=0), -1))) == 1
    reason = "`{}` takes its output, and need not keep its samples apart: write flatten(1)"
    for name, view in {
        "view": lambda m, x, y: y.view(-1, 24),
        "view_1": lambda m, x, y: y.view(m.other(x).view(-1, 24).size(0), -1),
        "reshape": lambda m, x, y: y.reshape(x.mean(0).size(0), -1),
        "reshape_1": lambda m, x, y: y.reshape(torch.reshape(x, (-1, 2)).shape[0], -1),
    }.items():
        assert viewed(view) == reason.format(name)


class Viewed(nn.Module):
    """A layer's output, viewed by a function of the model, its input and that output."""

    def __init__(self, view: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.other, self.bn = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.last, self.view = nn.Linear(24, 2), view

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.view(self, x, self.first(x)))


def viewed(view: Callable[[Any, Tensor, Tensor], Tensor]) -> int | str:
    """How many consumers the walk finds, or why it ends."""
    captured = capture(Viewed(view))
    (call,) = captured.calls(captured.model.first)
    found = linear_consumers(captured, call, 4, -3, "signs")
    return found if isinstance(found, str) else len(found)


class Averaged(nn.Module):
    """A pooling over the last axis of a linear layer's output: over its units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Linear(3, 8), nn.AvgPool1d(2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.first(x)))


def test_pooling_over_the_units_themselves_is_no_way_through() -> None:
    captured = capture(Averaged())
    (call,) = captured.calls(captured.model.first)
    reason = linear_consumers(captured, call, 8, -1, "signs")
    assert reason == "`pool` (AvgPool1d) takes its output, and signs cannot be moved past that"
