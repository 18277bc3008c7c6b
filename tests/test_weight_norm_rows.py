"""Rows that torch's fused kernel makes NaN or zeros of, beside rows it takes: g·v/‖v‖ and its gradients in float64 decide.

On a GPU, and with ``TRITON_INTERPRET=1`` here, Triton's programs compose them: see test_triton.py.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from support import gaussian
from torch import Tensor

from reparam.kernels import backend
from reparam.kernels.weight_norm import compose, fused_axis

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Of v and g.
ROWS = {
    "ordinary": (1.0, 1.0),
    "zeros": (0.0, 2.0),
    "dead for long": (1e-23, 1.0),
    "squares underflow": (1e-25, 1e-25),
    "small": (1e-12, 3.0),
    "large": (1e12, 1e12),
    "squares overflow": (1e25, 1e25),
    "near the largest": (1e37, 1e37),
    "squares alone overflow": (1e25, 1.0),
    "no scale": (1e-30, 0.0),
    "product overflows": (1e8, 1e37),
    "ordinary again": (0.5, -1.0),
}
VALUE, GRADIENT = 3e-7, 1e-6  # of a row's norm, or of what the gradient is the sum of


def rows(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """g and v with the rows above on axis 0."""
    v, scales = gaussian(len(ROWS), math.prod(shape)), list(ROWS.values())
    size = torch.tensor([a for a, _ in scales], dtype=torch.float64)[:, None]
    v = (v.double() / v.double().norm(dim=1, keepdim=True) * size).float().reshape(-1, *shape)
    return torch.tensor([b for _, b in scales]).reshape(-1, *[1] * len(shape)), v


def exactly(g: Tensor, v: Tensor, toward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight and the gradients of g and v, by the formulas, in float64 and rows flattened; zeros for a row of zeros."""
    g, v, toward = (x.double().flatten(1) for x in (g, v, toward))
    norm = v.norm(dim=1, keepdim=True)
    norm[norm == 0] = 1
    u = v / norm
    along = (u * toward).sum(1, keepdim=True)
    return g * u, along, g / norm * (toward - u * along)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6,), (3, 2, 2), (2500,)])
def test_every_row_is_right(shape: tuple[int, ...], device: str) -> None:
    g, v = rows(shape)
    toward = gaussian(*v.shape, seed=1)
    leaves = [x.clone().to(device).requires_grad_() for x in (g, v)]
    axes = tuple(range(1, v.dim()))
    assert fused_axis(*leaves, axes) == 0
    if INTERPRETED or device == "cuda":
        assert backend.name(leaves[1].flatten(1)) == "triton"
    weight = compose(*leaves, axes)
    d_g, d_v = (x.cpu() for x in torch.autograd.grad(weight, leaves, toward.to(device)))
    values = weight.detach().cpu()
    right, right_g, right_v = exactly(g, v, toward)
    of_weight, of_v = g.double().flatten().abs(), right_v.norm(dim=1)
    for i, name in enumerate(ROWS):
        error = (values[i].double().flatten() - right[i]).norm()
        assert error <= VALUE * of_weight[i], name
        assert abs(float(d_g[i].double() - right_g[i])) <= GRADIENT * float(toward[i].norm()), name
        fits = right_v[i].abs() < torch.finfo(torch.float32).max
        error = (d_v[i].double().flatten() - right_v[i])[fits].norm()
        assert error <= GRADIENT * of_v[i], name
        assert bool(d_v[i].flatten()[~fits].isinf().all()), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_changes_nothing_in_others(device: str) -> None:
    g, v = (x.to(device) for x in rows((40,)))
    toward = gaussian(*v.shape, seed=1).to(device)

    def all_of(g: Tensor, v: Tensor, toward: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (g, v)]
        weight = compose(*leaves, (1,))
        return [weight.detach(), *torch.autograd.grad(weight, leaves, toward)]

    ordinary = torch.tensor([name.startswith("ordinary") for name in ROWS], device=device)
    together, alone = all_of(g, v, toward), all_of(g[ordinary], v[ordinary], toward[ordinary])
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found[ordinary], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device: str) -> None:
    g, v = torch.ones(3, 1, device=device), torch.ones(3, 4, device=device)
    v[1, 2] = torch.nan
    g.requires_grad_(), v.requires_grad_()
    weight = compose(g, v, (1,))
    gradients = torch.autograd.grad(weight.sum(), (g, v))
    for found in (weight, *gradients):
        assert found.isnan().any(1).tolist() == [False, True, False]
    assert compose(torch.ones(0, 1, device=device), torch.ones(0, 4, device=device), (1,)).shape == (0, 4)


def test_of_the_last_axis() -> None:
    """The same rows as columns, which torch's kernel takes on a CPU and Triton's programs leave to torch's operations."""
    g, v = rows((6,))
    assert fused_axis(g.T, v.T.contiguous(), (0,)) == (None if INTERPRETED else 1)
    toward = gaussian(*v.shape, seed=1)
    found = []
    for turned in (False, True):
        leaves = [(x.T.contiguous() if turned else x.clone()).requires_grad_() for x in (g, v)]
        weight = compose(*leaves, (0,) if turned else (1,))
        gradients = torch.autograd.grad(weight, leaves, toward.T if turned else toward)
        found.append([x.detach().T if turned else x.detach() for x in (weight, *gradients)])
    for one, other, size in zip(*found, (g.abs(), toward.norm(dim=1, keepdim=True), None), strict=True):
        size = other.double().norm(dim=1, keepdim=True) if size is None else size
        assert bool(((one - other).double().norm(dim=1, keepdim=True) <= GRADIENT * size).all())


def test_float64_is_not_for_triton() -> None:
    g, v = rows((6,))
    assert fused_axis(g.double(), v.double(), (1,)) == (None if INTERPRETED else 0)
