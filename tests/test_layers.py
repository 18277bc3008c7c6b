"""GmP layers against the plain layers they stand for, float64 the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from reparam import layers
from reparam.errors import NonFiniteError
from reparam.layers import LAYERS, GeometricMixin, GmPConv2d, GmPLinear

EXACT = 1e-12  # float64 round trip, relative to the output
FLOAT32_ROW = 2e-7  # float32 SP -> GmP -> SP, relative to the row's norm

CASES = {
    "linear": lambda: nn.Linear(7, 5),
    "linear without bias": lambda: nn.Linear(7, 5, bias=False),
    "linear n=1": lambda: nn.Linear(1, 4),
    "linear n=2": lambda: nn.Linear(2, 4),
    "linear n=400": lambda: nn.Linear(400, 3),
    "conv": lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1),
    "conv dilated": lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, bias=False),
    "conv grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "conv 1x1 depthwise, n=1": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "conv reflect": lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"),
    "conv same": lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="circular"),
}


@pytest.fixture(params=CASES)
def plain(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.mark.parametrize("prefix", ["GmP", "WN", "Unit"])
def test_layers_go_by_their_names(prefix: str) -> None:
    of_linear = {cls.__name__: cls for (_, plain), cls in LAYERS.items() if plain is nn.Linear}
    name = f"{prefix}Linear"
    assert getattr(layers, name) is of_linear[name]


def gmp(plain: nn.Module) -> GeometricMixin:
    return LAYERS["gmp", type(plain)].from_plain(plain)


def an_input(plain: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, plain.in_features) if isinstance(plain, nn.Linear) else (2, plain.in_channels, 7, 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def test_computes_what_the_plain_layer_computes(plain: nn.Module) -> None:
    plain.double()
    layer, x = gmp(plain), an_input(plain)
    with torch.no_grad():
        expected, found = plain(x), layer(x)
    assert isinstance(layer, type(plain))
    assert float((found - expected).norm() / expected.norm()) <= EXACT
    assert repr(layer).split("(", 1)[1] == repr(plain).split("(", 1)[1]


def test_the_plain_layer_is_left_alone(plain: nn.Module) -> None:
    before = copy.deepcopy(plain.state_dict())
    layer = gmp(plain)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in before.items())


def test_keys_and_shapes_are_the_file_formats(plain: nn.Module) -> None:
    layer = gmp(plain)
    n = plain.weight[0].numel()
    units = len(plain.weight)
    expected = {"r": (units,), "theta": (units, max(n - 1, 1))}
    if plain.bias is not None:
        expected["lambda_"] = (units,)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == expected
    assert layer.theta.requires_grad == (n > 1)
    record = layer.record()
    assert (record.kind, record.spec.fan_in, record.bias) == (
        "gmp",
        n,
        "lambda_" if "lambda_" in expected else None,
    )


def test_gradients_are_those_of_the_formula(plain: nn.Module) -> None:
    layer = gmp(plain.double())
    x = an_input(plain)[:1, ..., :5].requires_grad_() if isinstance(plain, nn.Conv2d) else an_input(plain)
    named = {key: value for key, value in layer.named_parameters() if value.requires_grad}

    def forward(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(named, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, tuple(named.values()), rtol=1e-6, atol=1e-8)


def test_folds_back(plain: nn.Module) -> None:
    plain.eval()
    plain.weight.requires_grad = False
    folded = gmp(plain).fold()
    assert type(folded) is type(plain)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert repr(folded) == repr(plain)
    assert folded.training is False
    assert folded.weight.requires_grad is False
    assert folded.weight.dtype == torch.float32
    assert row_error(folded.weight, plain.weight) <= FLOAT32_ROW
    if plain.bias is not None:
        assert folded.bias.requires_grad
        torch.testing.assert_close(folded.bias, plain.bias, rtol=2.0**-22, atol=0)
    assert set(vars(folded)) == set(vars(plain))


def test_folds_back_to_what_it_composes_while_training(plain: nn.Module) -> None:
    layer = gmp(plain)
    folded = layer.fold()
    assert torch.equal(folded.weight, layer.weight)
    assert folded.bias is None if layer.bias is None else torch.equal(folded.bias, layer.bias)


def pruned() -> nn.Linear:
    generator = torch.Generator().manual_seed(2)
    plain = nn.Linear(27, 64)
    keep = torch.rand(64, 27, generator=generator) < 0.2
    with torch.no_grad():
        plain.weight.copy_(torch.randn(64, 27, generator=generator) * keep)
    return plain


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_exact_zeros_survive_a_cast(cast: object) -> None:
    plain = pruned()
    layer = cast(GmPLinear.from_plain(plain))  # type: ignore[operator]
    mask = plain.weight == 0
    assert int(mask.sum()) > 1000
    assert torch.equal(layer.weight == 0, mask)
    assert torch.equal(layer.fold().weight == 0, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_stay_float32_below_a_narrow_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    plain = nn.Linear(40, 6)
    layer = GmPLinear.from_plain(plain).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(an_input(plain, dtype)).dtype == dtype
    assert torch.equal(layer.weight, GmPLinear.from_plain(plain).fold().weight.to(dtype))
    assert layer.fold().weight.dtype == dtype
    assert layer.float().weight.dtype == torch.float32


def test_a_zero_row_with_a_bias_keeps_its_bias() -> None:
    torch.manual_seed(4)
    plain = nn.Linear(6, 3).double()
    with torch.no_grad():
        plain.weight[1] = 0
    layer, x = GmPLinear.from_plain(plain), an_input(plain)
    assert set(layer.state_dict()) == {"r", "theta", "bias"}
    assert layer.record().bias == "bias"
    torch.testing.assert_close(layer(x), plain(x), rtol=EXACT, atol=EXACT)
    layer(x).sum().backward()
    assert layer._parameters["bias"].grad is not None
    assert torch.equal(layer.fold().bias, plain.bias)


@pytest.mark.parametrize("size", [1e-42, 1e-24, 1.0, 1e20, 1e37])
def test_weight_norm_of_any_size(size: float) -> None:
    """Squares of these do not fit float32, the weights and, where they fit it, the gradients do."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight.mul_(size)
    layer = LAYERS["wn", nn.Linear].from_plain(linear)
    wide = copy.deepcopy(layer).double()
    composed = layer.composed().detach()
    assert row_error(composed, linear.weight.detach()) <= (1e-6 if size > 1e-30 else 1e-2)
    assert row_error(layer.fold().weight.detach(), composed) <= (1e-6 if size > 1e-30 else 1e-2)
    if size > 1e-30:
        toward = torch.randn(3, 6)
        for one in (layer, wide):
            (one.composed() * (toward.to(one.weight_v.dtype) / size)).sum().backward()
        for role, parameter in layer.named_parameters():
            if role != "bias":
                expected = wide.get_parameter(role).grad
                torch.testing.assert_close(parameter.grad.double(), expected, rtol=2e-5, atol=2e-6 / size)


def test_nan_weights_are_refused() -> None:
    plain = nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        plain.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        GmPConv2d.from_plain(plain)


def test_copies_and_pickles(plain: nn.Module) -> None:
    layer, x = gmp(plain), an_input(plain, torch.float32)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
        copied.r.data.mul_(2)
        assert not torch.equal(copied(x), layer(x))


def test_trains_downhill() -> None:
    torch.manual_seed(5)
    layer = GmPLinear.from_plain(nn.Linear(10, 1))
    x, target = torch.randn(64, 10), torch.randn(64, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(500):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    affine = torch.cat([x, torch.ones(64, 1)], dim=1)
    best = float((affine @ torch.linalg.lstsq(affine, target).solution - target).square().mean())
    assert losses[0] > 1.5 * best
    assert losses[-1] - best < 0.2 * (losses[0] - best)
