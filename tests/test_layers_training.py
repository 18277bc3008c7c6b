"""What the references say of training: initialization, the geometry of WN's steps, BN as WN, where the scale stands."""

from __future__ import annotations

import pytest
import torch
from layer_cases import SINGLE, Conv1D, inputs, plain_layer, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.errors import ReparamError
from reparam.layers import (
    GmPLinear,
    Reparameterized,
    initialize_from_data,
    initialize_paper,
    layer_class,
)

EXACT = 1e-12

NORMALIZABLE = [k for k in SINGLE if k not in ("linear n=1",)]


def layer_of(form: str, kind: str) -> Reparameterized:
    plain = plain_layer(kind)
    return layer_class(form, type(plain)).from_plain(plain)


def moments(layer: Reparameterized, out: Tensor) -> tuple[Tensor, Tensor]:
    axes = [a for a in range(out.dim()) if a != layer.kind.channel % out.dim()]
    std, mean = torch.std_mean(out.detach(), dim=axes, correction=0)
    return mean, std


@pytest.mark.parametrize("form", ["gmp", "wn"])
@pytest.mark.parametrize("kind", NORMALIZABLE)
def test_data_dependent_initialization_standardizes(form: str, kind: str) -> None:
    layer, x = layer_of(form, kind), inputs(kind)
    direction = layer.theta.clone() if form == "gmp" else None
    assert initialize_from_data(layer, *x) == [""]
    mean, std = moments(layer, layer(*x))
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-10, atol=1e-10)
    if layer.held["weight"].bias_role is not None:
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=1e-10, atol=1e-10)
    if direction is not None:
        assert torch.equal(layer.theta, direction)


@pytest.mark.parametrize("mean", [None, "mn", "mbn"])
@pytest.mark.parametrize("form", ["gmp", "wn"])
def test_every_layer_of_a_network_in_one_pass(form: str, mean: str | None) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(4 * 9, 5)]
    model = nn.Sequential(*parts).double()
    for i in (0, 2, 4):
        model[i] = layer_class(form, type(model[i])).from_plain(model[i])
        if mean:
            model[i].normalize_mean(mean)
    x = torch.randn(32, 3, 6, 6, dtype=torch.float64) * 3 + 1
    assert initialize_from_data(model, x) == ["0", "2", "4"]
    seen: list[tuple[Tensor, Tensor]] = []
    for i in (0, 2, 4):
        model[i].register_forward_hook(lambda layer, args, out: seen.append(moments(layer, out)))
    model(x)
    for found, deviation in seen:
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)
        torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=1e-9, atol=0)


def test_data_dependent_initialization_with_the_scale_outside() -> None:
    plain, (x,) = plain_layer("conv2d"), inputs("conv2d")
    inside = layer_class("gmp", nn.Conv2d).from_plain(plain)
    outside = layer_class("gmp", nn.Conv2d).from_plain(plain, scale_outside=True)
    initialize_from_data(inside, x), initialize_from_data(outside, x)
    assert relative_error(outside.r.reshape(-1, 1, 1) * outside(x), inside(x)) <= EXACT
    torch.testing.assert_close(outside.r, inside.r, rtol=EXACT, atol=EXACT)


def test_constant_units_keep_their_scale_and_unit_norm_has_none() -> None:
    layer, (x,) = layer_of("gmp", "linear"), inputs("linear")
    with torch.no_grad():
        layer.r[2] = 0
    initialize_from_data(layer, x)
    assert float(layer.r.detach()[2]) == 0
    assert bool(torch.isfinite(layer(x)).all())
    with pytest.raises(ReparamError, match="has no scale"):
        initialize_from_data(layer_of("unit", "linear"), x)


def test_paper_initialization_does_not_depend_on_the_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for plain in (nn.Linear(50, 4000), nn.Conv2d(2, 40, 5), nn.LSTM(6, 8), Conv1D(4, 5)):
        layer = layer_class("gmp", type(plain)).from_plain(plain)
        initialize_paper(layer, generator)
        for name in layer.held:
            tensors = layer.tensors(name)
            assert torch.equal(tensors["r"], torch.ones_like(tensors["r"]))
            assert not tensors["lambda_"].any()
    layer = GmPLinear.from_plain(nn.Linear(50, 4000))
    initialize_paper(layer, generator)
    weight = layer.weight.detach()
    # Uniform on the sphere: zero mean, covariance 1/n, fourth moment 3/(n(n + 2)) of every coordinate.
    assert float(weight.mean(0).abs().max()) < 5 / (4000 * 50) ** 0.5
    assert abs(float(weight.square().mean()) * 50 - 1) < 1e-5
    assert abs(float(weight.pow(4).mean()) * 50 * 52 / 3 - 1) < 0.03
    wn = layer_class("wn", nn.Linear).from_plain(nn.Linear(50, 40))
    initialize_paper(wn, generator)
    assert torch.equal(wn.weight_g, torch.ones(40, 1))
    assert not wn.bias.any()


def test_weight_norms_steps_are_orthogonal_and_grow_v() -> None:
    """The slides: v·∇v = 0, so under plain SGD ‖v′‖² = ‖v‖² + ‖Δv‖²."""
    layer, (x,) = layer_of("wn", "conv2d"), inputs("conv2d")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        v, grad = layer.weight_v.detach().flatten(1).clone(), layer.weight_v.grad.flatten(1)
        assert float(((v * grad).sum(1) / (v.norm(dim=1) * grad.norm(dim=1))).abs().max()) <= EXACT
        optimizer.step()
        after = layer.weight_v.detach().flatten(1)
        grown = v.square().sum(1) + (after - v).square().sum(1)
        torch.testing.assert_close(after.square().sum(1), grown, rtol=EXACT, atol=0)
        assert bool((after.norm(dim=1) > v.norm(dim=1)).all())


def test_gradient_of_weight_norm_is_the_slides() -> None:
    layer, (x,) = layer_of("wn", "linear"), inputs("linear")
    plain = layer.fold()
    plain(x).pow(3).sum().backward()
    layer(x).pow(3).sum().backward()
    w, grad = plain.weight.detach(), plain.weight.grad
    v, g = layer.weight_v.detach(), layer.weight_g.detach()
    norm = v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight_g.grad, (grad * v).sum(1, keepdim=True) / norm)
    projected = grad - w * (w * grad).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    torch.testing.assert_close(layer.weight_v.grad, g / norm * projected)


def test_batch_norm_is_weight_norm_under_the_datas_covariance() -> None:
    """The paper's eq. 15: BN(wᵀx) = γ(w/‖w‖_Σ)ᵀx + β for x of zero mean: WN of L-transformed data, Σ = LLᵀ."""
    torch.manual_seed(0)
    x = torch.randn(64, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    x -= x.mean(0)
    plain, norm = nn.Linear(7, 5, bias=False).double(), nn.BatchNorm1d(5, eps=1e-30).double()
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    root = torch.linalg.cholesky(x.T @ x / len(x))
    wn = layer_class("wn", nn.Linear).from_plain(nn.Linear(7, 5).double())
    with torch.no_grad():
        wn.weight_v.copy_(plain.weight @ root)  # ‖Lᵀw‖ = ‖w‖_Σ
        wn.weight_g.copy_(norm.weight[:, None])
        wn.bias.copy_(norm.bias)
    whitened = torch.linalg.solve_triangular(root, x.T, upper=False).T
    assert relative_error(wn(whitened), norm(plain(x))) <= EXACT


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_scale_trains_the_same_inside_and_after_relu(optimizer: type[torch.optim.Optimizer]) -> None:
    plain, (x,) = plain_layer("conv2d"), inputs("conv2d")
    inside = layer_class("gmp", nn.Conv2d).from_plain(plain)
    outside = layer_class("gmp", nn.Conv2d).from_plain(plain, scale_outside=True)
    steps = [optimizer(layer.parameters(), lr=0.01) for layer in (inside, outside)]
    for _ in range(20):
        for layer, step in zip((inside, outside), steps, strict=True):
            out = F.relu(layer(x))
            if layer is outside:
                out = out * layer.r.reshape(-1, 1, 1)
            step.zero_grad()
            (out - 1).square().mean().backward()
            step.step()
        assert bool((inside.r > 0).all())
    for name, value in inside.named_parameters():
        torch.testing.assert_close(outside.get_parameter(name), value, rtol=1e-9, atol=1e-9)
    assert not torch.equal(inside.r, layer_class("gmp", nn.Conv2d).from_plain(plain).r)


def test_scales_that_cannot_stand_outside_say_why() -> None:
    with pytest.raises(ReparamError, match="only GmP"):
        layer_class("wn", nn.Linear).from_plain(plain_layer("linear"), scale_outside=True)
    plain = plain_layer("linear")
    with torch.no_grad():
        plain.weight[1] = 0
    with pytest.raises(ReparamError, match="keeps its bias"):
        GmPLinear.from_plain(plain, scale_outside=True)


def test_outside_the_layer_is_of_unit_rows() -> None:
    plain, (x,) = plain_layer("linear"), inputs("linear")
    layer = GmPLinear.from_plain(plain, scale_outside=True)
    norm = plain.weight.norm(dim=1)
    assert relative_error(layer.weight, plain.weight / norm[:, None]) <= EXACT
    assert relative_error(layer.bias, plain.bias / norm) <= EXACT
    assert relative_error(layer.fold()(x), layer(x)) <= EXACT
    assert relative_error(layer.fold(scale=layer.r.abs())(x), plain(x)) <= EXACT
