"""Forward-mode derivatives of the map, by finite differences and reverse mode: torch passes no tangents through an operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import gaussian
from torch import Tensor, nn

from reparam.kernels.hyperspherical import decode, encode
from reparam.kernels.operator import compose_rows
from reparam.layers import LAYERS

F32, F64 = torch.float32, torch.float64
RIGHT = torch.tensor(math.pi / 2, dtype=F64).item()


def a_map(n: int, radius: bool = True) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    r, theta = encode(gaussian(4, n).double(), F64)
    theta = theta - 0.1  # off the right angle that a row of one has

    def rows(r: Tensor, theta: Tensor) -> Tensor:
        return compose_rows(r if radius else None, theta, n, F64, F64)

    return rows, r, theta


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own, on the way to forward mode
@pytest.mark.parametrize("radius", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_tangents_are_those_of_reverse_mode(n: int, radius: bool) -> None:
    rows, r, theta = a_map(n, radius)
    along = gaussian(4, seed=1).double(), gaussian(*theta.shape, seed=2).double()
    value, found = torch.func.jvp(rows, (r, theta), along)
    torch.testing.assert_close(value, rows(r, theta), rtol=0, atol=1e-15)
    leaves = [x.requires_grad_() for x in (r, theta)]
    for toward in torch.eye(4 * n, dtype=F64).reshape(-1, 4, n):
        gradients = torch.autograd.grad(rows(*leaves), leaves, toward, allow_unused=True)
        expected = sum((a * b).sum() for a, b in zip(along, gradients, strict=True) if b is not None)
        torch.testing.assert_close((toward * found).sum(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_second_derivative() -> None:
    rows, r, theta = a_map(5)
    along, step = gaussian(*theta.shape, seed=2).double(), 1e-4

    def slope(theta: Tensor) -> Tensor:
        return torch.func.jvp(lambda theta: rows(r, theta), (theta,), (along,))[1]

    found = torch.func.jvp(slope, (theta,), (along,))[1]
    a, b, c = (rows(r, theta + i * step * along) for i in (-1, 0, 1))
    torch.testing.assert_close(found, (a - 2 * b + c) / step**2, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_exact_zeros_stay_and_move() -> None:
    """A trailing zero weight, and a last coordinate of zero: zeros by value, not by derivative."""
    ends = [[0.3, RIGHT, 0.0, 0.0], [0.3, 0.2, 0.1, 2 * RIGHT], [0.3, 2 * RIGHT, 0.1, 0.2]]
    theta = torch.tensor(ends, dtype=F64)
    along = torch.ones_like(theta)

    def rows(theta: Tensor) -> Tensor:
        return compose_rows(None, theta, 5, F64, F64)

    value, found = torch.func.jvp(rows, (theta,), (along,))
    assert torch.equal(value == 0, rows(theta) == 0)
    assert value[0, 2:].tolist() == [0, 0, 0]
    assert value[1, 3] == 0
    assert value[2, 1] != 0  # a straight angle before the last is none of the format's zeros
    step = 1e-6
    torch.testing.assert_close(
        found,
        (decode(theta + step * along, 5, F32) - decode(theta - step * along, 5, F32)) / (2 * step),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("form", ["gmp", "wn"])
def test_a_layer_in_both_modes(form: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[form, nn.Linear].from_plain(nn.Linear(5, 3)).double(), torch.ones(2, 5, dtype=F64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def out(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, x)

    forward = torch.func.jacfwd(out)(parameters)
    for i, element in enumerate(layer(x).flatten()):
        reverse = torch.autograd.grad(element, list(layer.parameters()), retain_graph=True)
        for (name, _), right in zip(layer.named_parameters(), reverse, strict=True):
            assert right.abs().max() > 0
            torch.testing.assert_close(forward[name].flatten(0, 1)[i], right, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_compiled() -> None:
    rows, r, theta = a_map(5)
    along = gaussian(*theta.shape, seed=2).double()

    def tangent(theta: Tensor) -> Tensor:
        return torch.func.jvp(lambda theta: rows(r, theta), (theta,), (along,))[1]

    torch._dynamo.reset()
    found = torch.compile(tangent, backend="aot_eager")(theta)
    torch.testing.assert_close(found, tangent(theta), rtol=1e-12, atol=1e-12)
