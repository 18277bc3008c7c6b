"""Identities of the references that hold layer by layer, beside those of the maps and of training in general.

The gradients of every variant a layer comes in; the geometry of WN's steps for every kind; BN as WN under the data's
covariance; the operator, through a layer and in the type it is trained in, against 60 digits; very long rows.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import oracles
import pytest
import torch
from layer_cases import FORMS, KINDS, SINGLE, flat, inputs, perturb, plain_layer, relative_error
from oracles import FLOAT32_GRADIENT, FLOAT32_ROUNDED, FLOAT32_ROW, FLOAT64
from support import gaussian
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.kernels.gradient import rows_gradient
from reparam.layers import GmPLinear, Reparameterized, layer_class
from reparam.parameterizations.weight_norm import norm_axes

EXACT = 1e-12
#: ‖Δw‖/‖w‖ of a row of n = 25,088, float32 weights to float32 weights
FLOAT32_MAP = 1e-6
#: relative to the norm of the exact one: that at float32 angles, with r and the result rounded to float32
FLOAT32_LAYER_GRADIENT = FLOAT32_GRADIENT + 2 * FLOAT32_ROUNDED

F32, F64 = torch.float32, torch.float64

RECURRENT = ["rnn", "lstm", "rnn cell", "lstm cell"]
OUTSIDE = [k for k in SINGLE if k != "attention out"]
MN = [k for k in OUTSIDE if "transposed" not in k] + RECURRENT
VARIANTS = (
    [("gmp", kind, "outside") for kind in OUTSIDE]
    + [(form, kind, "mn") for form in FORMS for kind in MN]
    + [(form, kind, "mbn") for form in FORMS for kind in OUTSIDE]
)


def layer_of(form: str, kind: str, **options: bool) -> Reparameterized:
    plain = plain_layer(kind)
    cls = layer_class(form, type(plain))
    assert cls is not None
    return cls.from_plain(plain, **options)


def tensors_of(layer: Reparameterized) -> list[tuple[str, dict[str, nn.Parameter]]]:
    return [(name, layer.tensors(name)) for name in layer.held]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("form", "kind", "variant"), VARIANTS)
def test_gradients_of_every_variant(form: str, kind: str, variant: str, training: bool) -> None:
    """The scale outside, MN and MBN, running means not zero, as the input and every parameter see them."""
    layer = layer_of(form, kind, scale_outside=variant == "outside")
    if variant != "outside":
        layer.normalize_mean(variant)
        for buffer in layer.buffers():
            buffer.copy_(gaussian(*buffer.shape, seed=3))
    perturb(layer, 0.1).train(training)
    x = inputs(kind)
    # A scale outside is not this layer's to apply.
    unused = {"r"} if variant == "outside" else set()
    named = {key: p for key, p in layer.named_parameters() if p.requires_grad and key not in unused}

    def forward(first: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(named, values, strict=True)) | copy.deepcopy(dict(layer.named_buffers()))
        return flat(torch.func.functional_call(layer, state, (first, *x[1:])))

    leaves = (x[0].requires_grad_(), *named.values())
    assert torch.autograd.gradcheck(forward, leaves, rtol=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_norms_steps_are_orthogonal_for_every_kind(kind: str) -> None:
    """The slides: v·∇v = 0 for each norm, so a step of plain SGD has ‖v′‖² = ‖v‖² + ‖Δv‖²."""
    layer, x = perturb(layer_of("wn", kind), 0.1), inputs(kind)
    before = {name: layer.tensors(name)["weight_v"].detach().clone() for name in layer.held}
    flat(layer(*x)).pow(3).sum().backward()
    # v·∇v is the difference of two terms g·∂L/∂g, and rounded at their scale.
    terms = {name: (t["weight_g"] * t["weight_g"].grad).detach() for name, t in tensors_of(layer)}
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    for name, tensors in tensors_of(layer):
        v, grad, after = before[name], tensors["weight_v"].grad, tensors["weight_v"].detach()
        axes = norm_axes(tuple(v.shape), tuple(terms[name].shape))

        def squares(a: Tensor, axes: tuple[int, ...] = axes) -> Tensor:
            return a.square().sum(axes, keepdim=True)

        scale = terms[name].abs() + (squares(v) * squares(grad)).sqrt()
        assert bool(((v * grad).sum(axes, keepdim=True).abs() <= EXACT * scale).all())
        torch.testing.assert_close(squares(after), squares(v) + squares(after - v), rtol=EXACT, atol=0)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_batch_norm_is_weight_norm_under_the_datas_covariance(eps: float) -> None:
    """The paper's eq. 15 with means and ε: BN(wᵀx + b) = γ·wᵀ(x − E[x])/√(wᵀΣw + ε) + β, Σ = LLᵀ of the batch.

    √(wᵀΣw + ε) = ‖(Lᵀw, √ε)‖: a WN+MN layer of v = (Lᵀw, √ε) on (L⁻¹x, 0) is the batch norm, its gradients too.
    """
    torch.manual_seed(0)
    mixing = torch.randn(7, 7, dtype=F64)
    x = torch.randn(64, 7, dtype=F64) @ mixing + 3 * torch.randn(7, dtype=F64)
    plain, norm = nn.Linear(7, 5).double(), nn.BatchNorm1d(5, eps=eps).double()
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    expected = norm(plain(x))
    centered = x - x.mean(0)
    covariance = centered.T @ centered / len(x)
    w = plain.weight.detach()
    variance = ((w @ covariance) * w).sum(1)
    formula = norm.weight * (centered @ w.T) / (variance + eps).sqrt() + norm.bias
    assert relative_error(expected, formula) <= EXACT
    assert norm.weight.detach().lt(0).any()

    root = torch.linalg.cholesky(covariance)
    layer = layer_class("wn", nn.Linear).from_plain(nn.Linear(8, 5).double()).normalize_mean("mn")
    with torch.no_grad():
        layer.weight_v.copy_(F.pad(w @ root, (0, 1), value=math.sqrt(eps)))
        layer.weight_g.copy_(norm.weight[:, None])
        bias = layer.tensors()["bias"].copy_(norm.bias)
    whitened = F.pad(torch.linalg.solve_triangular(root, x.T, upper=False).T, (0, 1))
    found = layer(whitened)
    assert relative_error(found, expected) <= EXACT
    found.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert relative_error(layer.weight_v.grad[:, :7] @ root.T, plain.weight.grad) <= EXACT
    assert relative_error(layer.weight_g.grad[:, 0], norm.weight.grad) <= EXACT
    assert relative_error(bias.grad, norm.bias.grad) <= EXACT


VECTORS = [case for case in oracles.vectors() if "grad_theta_equator" in case]


@pytest.mark.skipif(not VECTORS, reason="no gmp_vectors.json: set REPARAM_SHARED")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_a_layers_values_and_gradients_are_those_of_60_digits(
    case: dict[str, Any], dtype: torch.dtype
) -> None:
    """From the weight itself, through the operator: ∂L/∂t = r·∂(g·u)/∂t and ∂L/∂r = u·g."""
    weight, u = oracles.floats(case["weight_hex"]), oracles.floats(case["u"])
    grad, r = oracles.floats(case["grad_u_hex"]), float(case["r"])
    plain = nn.Linear(case["n"], 1, bias=False)
    plain.weight = nn.Parameter(weight[None].to(dtype))
    layer = GmPLinear.from_plain(plain)
    layer.weight.backward(grad[None].to(dtype))
    value, slope = (FLOAT64, FLOAT64) if dtype == F64 else (FLOAT32_ROW, FLOAT32_LAYER_GRADIENT)
    expected = r * oracles.floats(case["grad_theta_equator"])
    assert float((layer.weight.detach()[0] - weight).norm()) <= value * r
    assert float((layer.theta.grad[0] - expected).norm()) <= slope * float(expected.norm())
    assert abs(float(layer.r.grad) - float(u @ grad)) <= slope * float(grad.norm())


@pytest.mark.parametrize("stored", [F32, F64])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_gradients_where_cosines_are_small_or_zero(n: int, stored: torch.dtype) -> None:
    """60 digits: a right angle as stored has cosine zero wherever it stands, also once theta is cast to float64."""
    right, straight = oracles.stored_zeros(stored)
    special = [right, -right, straight, right - 1e-2, right - 2e-3, right - 1e-3, right - 1e-5, right - 1e-12]
    theta = gaussian(len(special), n - 1, seed=n).repeat(n - 1, 1).to(stored).double()
    for column in range(n - 1):
        rows = slice(column * len(special), (column + 1) * len(special))
        theta[rows, column] = torch.tensor(special, dtype=F64).to(stored).double()
    theta[:, :-1].clamp_(-right, right)  # only the last goes beyond
    grad, r = gaussian(len(theta), n, seed=1).double(), gaussian(len(theta), seed=2).double()
    d_r, d_theta = rows_gradient(r, theta, n, stored, grad)
    for row in range(len(theta)):
        angles, g = theta[row].tolist(), grad[row].tolist()
        u = oracles.exact_direction(angles, n, stored)
        assert abs(float(d_r[row]) - float(sum(a * b for a, b in zip(u, g, strict=True)))) <= EXACT
        slopes = oracles.exact_gradient(angles, g, stored)
        exact = torch.tensor([float(slope) for slope in slopes], dtype=F64)
        assert float((d_theta[row] - r[row] * exact).norm()) <= EXACT * float(r[row].abs() * grad[row].norm())


def test_a_float32_row_of_25088() -> None:
    """VGG's first dense layer: what the float32 angles hold, and the map and its gradient at these very angles."""
    n = 25_088
    torch.manual_seed(0)
    plain = nn.Linear(n, 2)
    layer, grad = GmPLinear.from_plain(plain), gaussian(2, n, seed=4)
    weight = layer.weight
    weight.backward(grad)
    assert (weight.dtype, layer.theta.dtype) == (F32, F32)
    assert float(oracles.row_errors(weight.detach(), plain.weight.detach()).max()) <= FLOAT32_MAP
    for row in range(2):
        u, slopes = by_loops(layer.theta[row].tolist(), grad[row].tolist())
        r = float(layer.r[row].detach())
        for found, exact in ((weight[row].detach(), r * u), (layer.theta.grad[row], r * slopes)):
            assert float((found.double() - exact).norm() / exact.norm()) <= FLOAT32_ROUNDED
        assert abs(float(layer.r.grad[row]) / float(u @ grad[row].double()) - 1) <= FLOAT32_ROUNDED


def by_loops(angles: list[float], grad: list[float]) -> tuple[Tensor, Tensor]:
    """The unit row and ∂(g·u)/∂t, one coordinate after the other in float64 (DESIGN §2)."""
    prefix = [1.0]
    for t in angles:
        prefix.append(prefix[-1] * math.cos(t))
    u = [p * math.sin(t) for p, t in zip(prefix, angles, strict=False)] + prefix[-1:]
    slopes, state = [0.0] * len(angles), grad[-1]
    for j in reversed(range(len(angles))):
        sine, cosine = math.sin(angles[j]), math.cos(angles[j])
        slopes[j] = prefix[j] * (cosine * grad[j] - sine * state)
        state = sine * grad[j] + cosine * state
    return torch.tensor(u, dtype=F64), torch.tensor(slopes, dtype=F64)
