"""Starting from scratch: what is drawn, in every parameterization the same function, and the moments of pre-activations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from layer_cases import KINDS, SINGLE, inputs, plain_layer, relative_error
from torch import Tensor, nn

from reparam import convert, fold
from reparam.errors import ReparamError
from reparam.layers import Reparameterized, init_model, layer_class
from reparam.layers.kinds import kind_of, weight_names

EXACT = 1e-12
FORMS = (None, "wn", "gmp")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_of(form: str | None, plain: nn.Module) -> nn.Module:
    return plain if form is None else layer_class(form, type(plain)).from_plain(plain)


def plain_of(layer: nn.Module) -> nn.Module:
    return layer.fold() if isinstance(layer, Reparameterized) else layer


def rows(layer: nn.Module, name: str = "weight") -> Tensor:
    plain = plain_of(layer)
    return kind_of(plain).unit(plain).to_rows(plain.get_parameter(name).detach())


@pytest.mark.parametrize("how", ["paper", "glorot"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_function_in_every_parameterization(kind: str, how: str) -> None:
    plain = plain_layer(kind)
    init_model(plain, how, generator=seeded())
    other = plain_layer(kind)
    init_model(other, how, generator=seeded(1))
    # Unit norm leaves Glorot's scale to the next layer, and divides the paper's by 1 + ε.
    for form, exact in [("wn", EXACT), ("gmp", EXACT), *([("unit", 1e-7)] if how == "paper" else [])]:
        layer = layer_class(form, type(plain)).from_plain(plain_layer(kind))
        init_model(layer, how, generator=seeded())
        for name, value in plain.state_dict().items():
            found = layer.fold().state_dict()[name]
            torch.testing.assert_close(found, value, rtol=exact, atol=exact)
    names = weight_names(plain)
    assert names
    for name, value in plain.state_dict().items():
        if "bias" in name and name not in ("bias_k", "bias_v"):
            assert not value.any()
        elif name in names:
            assert not torch.equal(value, plain_layer(kind).state_dict()[name])
            assert plain.get_parameter(name).numel() < 5 or not torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", ["linear", "conv2d", "conv1d grouped", "transposed2d", "hf conv1d", "lstm", "attention"]
)
def test_paper_starts_with_unit_rows_and_no_shift(kind: str, form: str | None) -> None:
    layer = layer_of(form, plain_layer(kind))
    init_model(layer, "paper", generator=seeded())
    for name in weight_names(plain_of(layer)):
        norms = rows(layer, name).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=EXACT, atol=0)
    for name, parameter in layer.named_parameters():
        if name.split(".")[-1] == "r":
            assert torch.equal(parameter, torch.ones_like(parameter))
        if name.split(".")[-1] == "lambda_" or "bias" in name:
            assert not parameter.any()


# Bounds: a mean of N independent terms of variance s² lies within 5·s/√N of its expectation with probability
# 1 − 6e-7 (normal limit); with the n², or 2, numbers compared below still above 0.999.
SIGMAS = 5


@pytest.mark.parametrize("form", FORMS)
def test_papers_directions_are_uniform_on_the_sphere(form: str | None) -> None:
    n, units = 20, 20_000
    layer = layer_of(form, nn.Linear(n, units).double())
    init_model(layer, "paper", generator=seeded())
    u = rows(layer)
    # On the sphere E u_i = 0, Var u_i = 1/n; E u_i⁴ = 3/(n(n+2)), E u_i²u_j² = 1/(n(n+2)).
    assert float(u.mean(0).abs().max()) <= SIGMAS * math.sqrt(1 / n / units)
    fourth, mixed = 3 / (n * (n + 2)), 1 / (n * (n + 2))
    covariance = u.T @ u / units - torch.eye(n, dtype=torch.float64) / n
    assert float(covariance.diag().abs().max()) <= SIGMAS * math.sqrt((fourth - 1 / n**2) / units)
    off = covariance - covariance.diag().diag()
    assert float(off.abs().max()) <= SIGMAS * math.sqrt(mixed / units)
    # Rotation invariance beyond the covariance, which a Gaussian scaled to the wrong norm or a cube would share:
    # the fourth moment along any one direction. E u⁸ = 105/(n(n+2)(n+4)(n+6)).
    eighth = 105 / (n * (n + 2) * (n + 4) * (n + 6))
    for direction in (torch.eye(n, dtype=torch.float64)[-1], torch.full((n,), n**-0.5, dtype=torch.float64)):
        found = float((u @ direction).pow(4).mean())
        assert abs(found - fourth) <= SIGMAS * math.sqrt((eighth - fourth**2) / units)


@pytest.mark.parametrize("form", FORMS)
def test_a_fan_in_of_one_leaves_a_random_sign(form: str | None) -> None:
    layer = layer_of(form, nn.Linear(1, 10_000))
    init_model(layer, "paper", generator=seeded())
    weight = rows(layer)
    assert bool((weight.abs() == 1).all())
    assert abs(float(weight.mean())) <= SIGMAS / math.sqrt(10_000)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("plain", "fans"),
    [
        (lambda: nn.Linear(300, 200), (300, 200)),
        (lambda: nn.Conv2d(40, 60, 3), (40 * 9, 60 * 9)),
        (lambda: nn.Conv2d(40, 60, 5, groups=4), (10 * 25, 60 * 25)),
        (lambda: nn.ConvTranspose2d(40, 60, 3), (60 * 9, 40 * 9)),
    ],
)
def test_glorot_is_uniform_with_the_fans_bound(
    form: str | None, plain: object, fans: tuple[int, int]
) -> None:
    layer = layer_of(form, plain().double())
    init_model(layer, "glorot", generator=seeded())
    weight, bound = rows(layer).flatten(), math.sqrt(6 / sum(fans))
    assert bound * (1 - 20 / len(weight)) <= float(weight.abs().max()) <= bound * (1 + EXACT)
    # Uniform on ±c: variances c²/3 of w, 4c⁴/45 of w².
    assert abs(float(weight.mean())) <= SIGMAS * bound / math.sqrt(3 * len(weight))
    assert abs(float(weight.square().mean()) - bound**2 / 3) <= SIGMAS * bound**2 * math.sqrt(
        4 / 45 / len(weight)
    )
    if form == "gmp":
        torch.testing.assert_close(layer.r.detach(), rows(layer).norm(dim=1), rtol=EXACT, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [k for k in SINGLE if k != "linear n=1"])
def test_data_standardizes_every_layer_kind(kind: str, form: str | None) -> None:
    layer, x = layer_of(form, plain_layer(kind)), inputs(kind)
    init_model(layer, "data", [(x[0], torch.zeros(1))], seeded())
    out, channel = layer(*x).detach(), kind_of(layer).channel
    per_unit = out.movedim(channel, 0).flatten(1)
    std, mean = torch.std_mean(per_unit, dim=1, correction=0)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-10, atol=0)
    if plain_of(layer).bias is not None:
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
    # The directions are those of "paper".
    start = plain_layer(kind)
    init_model(start, "paper", generator=seeded())
    directions = rows(layer) / rows(layer).norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions, rows(start), rtol=0, atol=1e-10)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(36, 5)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    ("form", "mean"), [(None, None), ("gmp", None), ("wn", None), ("gmp", "mn"), ("wn", "mn"), ("gmp", "mbn")]
)
def test_data_standardizes_a_network_in_one_pass(form: str | None, mean: str | None) -> None:
    """The output layer too, which stays plain; the scale of the first stands after ReLU where the graph allows it."""
    model = network()
    if form is not None:
        model = convert(model, to=form)
        assert not isinstance(model.get_submodule("4"), Reparameterized)
    layers = [model.get_submodule(name) for name in ("0", "2", "4")]
    for layer in layers:
        if mean is not None and isinstance(layer, Reparameterized):
            layer.normalize_mean(mean)
    x = torch.randn(64, 3, 6, 6, dtype=torch.float64, generator=seeded()) * 3 + 1
    init_model(model, "data", iter([x]), seeded(1))
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        outside = isinstance(layer, Reparameterized) and layer.scale_outside
        scale = layer.r.detach() if outside else torch.ones(1, dtype=torch.float64)

        def look(layer: nn.Module, args: object, out: Tensor, scale: Tensor = scale) -> None:
            per_unit = out.detach().movedim(1, 0).flatten(1) * scale[:, None]
            seen.append(torch.std_mean(per_unit, dim=1, correction=0))

        layer.register_forward_hook(look)
    model(x)
    assert len(seen) == 3
    for std, found in seen:
        torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-9, atol=0)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)


def test_data_gives_one_function_in_every_parameterization() -> None:
    x = torch.randn(64, 3, 6, 6, dtype=torch.float64, generator=seeded()) + 1
    models = [network(), convert(network(), to="gmp"), convert(network(), to="wn")]
    for model in models:
        init_model(model, "data", [x], seeded(1))
    for model in models[1:]:
        assert relative_error(fold(model)(x), models[0](x)) <= 1e-10


@pytest.mark.parametrize("mean", ["mn", "mbn"])
@pytest.mark.parametrize("how", ["paper", "glorot", "data"])
def test_running_means_start_at_those_of_a_batch_and_norms_stay(how: str, mean: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5)).double()
    with torch.no_grad():
        model[3].weight.fill_(2.0)
    layer = layer_class("gmp", nn.Linear).from_plain(model[2]).normalize_mean(mean)
    model[2] = layer
    running = next(layer.buffers())
    x = torch.randn(32, 4, dtype=torch.float64, generator=seeded())
    if how != "data":
        running.fill_(7.0)
        init_model(model, how, generator=seeded())
        assert not running.any()
    init_model(model, how, [(x, None)], seeded())
    seen = torch.relu(model[0](x)).mean(0).detach()
    expected = seen if mean == "mn" else layer.composed().detach() @ seen
    torch.testing.assert_close(running, expected, rtol=EXACT, atol=EXACT)
    assert bool((model[3].weight == 2).all())
    # So evaluation begins as training does.
    trained = model(x)
    assert (
        relative_error(model.eval()(x), trained) <= 0.02
    )  # the batch just seen moved the mean by a hundredth


def test_repeatable_and_from_torchs_own_generator_without_one() -> None:
    drawn = []
    for _ in range(2):
        model = network()
        torch.manual_seed(5)
        init_model(model, "paper")
        drawn.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, drawn[1][key]) for key, value in drawn[0].items())
    state = torch.get_rng_state()
    init_model(model, "paper", generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.state_dict()["0.weight"], drawn[0]["0.weight"])


def test_what_is_refused() -> None:
    with pytest.raises(ReparamError, match=r"^--init he: one of paper, glorot, data$"):
        init_model(network(), "he")
    before = network()
    for batches in (None, []):
        with pytest.raises(ReparamError, match=r"^--init data: there is no batch of data"):
            init_model(before, "data", batches)
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in network().state_dict().items())


def test_running_means_of_a_layer_that_is_called_twice() -> None:
    """They lie between the means of its calls, of one batch in training mode."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.once(x).relu()).relu())

    torch.manual_seed(0)
    model = convert(Twice(), to="gmp", include=["*"], mean_norm=True, scale="inside").train()
    x = torch.randn(200, 6, generator=seeded(), dtype=torch.float64) + 2
    init_model(model, "paper", [x], seeded())
    running, seen = model.twice.running_input_mean.clone(), list[Tensor]()
    model.twice.register_forward_pre_hook(lambda layer, given: seen.append(given[0].mean(0).detach()))
    model(x)
    momentum = model.twice.mean.momentum
    first, second = seen
    # As a running mean weighs them: the later call a little more.
    expected = ((1 - momentum) * first + second) / (2 - momentum)
    torch.testing.assert_close(running, expected, rtol=EXACT, atol=EXACT)
