"""MN and MBN: subtracting a mean, inserted without changing anything, folded without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import FORMS, SINGLE, flat, inputs, perturb, plain_layer, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.errors import ReparamError
from reparam.layers import Reparameterized, calibrate, layer_class

EXACT = 1e-12

MN = [k for k in SINGLE if "transposed" not in k and k != "attention out"]
MN_RECURRENT = ["rnn", "lstm", "rnn cell", "lstm cell"]
MBN = [k for k in SINGLE if k != "attention out"]


def normalized(form: str, kind: str, mean: str) -> Reparameterized:
    plain = plain_layer(kind)
    return layer_class(form, type(plain)).from_plain(plain).normalize_mean(mean)


def mean_of(x: Tensor, axis: int) -> Tensor:
    axes = [a for a in range(x.dim()) if a != axis % x.dim()]
    return x.mean(axes, keepdim=True)


def plain_conv_of_centered(layer: Reparameterized, x: Tensor, mean: Tensor) -> Tensor:
    """The definition: the input is padded, the mean subtracted everywhere, the plain layer applied without padding."""
    weight, bias = layer.composed(), layer.form.bias(layer.tensors(), layer.held["weight"].dtype, False)
    if isinstance(layer, nn.Linear):
        return F.linear(x - mean, weight, bias)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return (x - mean) @ weight + bias
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    conv = (F.conv1d, F.conv2d, F.conv3d)[layer.kind.spatial - 1]
    return conv(padded - mean, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MN)
def test_mn_subtracts_after_padding(form: str, kind: str) -> None:
    layer, (x,) = perturb(normalized(form, kind, "mn")), inputs(kind)
    mean = mean_of(x, layer.kind.channel)
    found = layer(x)
    assert relative_error(found, plain_conv_of_centered(layer, x, mean)) <= EXACT
    torch.testing.assert_close(layer.running_input_mean, 0.01 * mean.flatten(), rtol=EXACT, atol=EXACT)
    layer.eval()
    running = layer.running_input_mean.reshape(mean.shape)
    assert relative_error(layer(x), plain_conv_of_centered(layer, x, running)) <= EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MBN)
def test_mbn_subtracts_the_mean_of_the_pre_activation(form: str, kind: str) -> None:
    layer, (x,) = perturb(normalized(form, kind, "mbn")), inputs(kind)
    before = layer.fold()  # its running mean is still zero
    out, axis = before(x), layer.kind.channel
    bias = before.bias.reshape(-1, *(1,) * layer.kind.spatial)
    assert relative_error(layer(x), out - mean_of(out, axis) + bias) <= EXACT
    torch.testing.assert_close(
        layer.running_mean,
        0.01 * (mean_of(out, axis).flatten() - before.bias).detach(),
        rtol=1e-10,
        atol=EXACT,
    )
    layer.eval()
    running = layer.running_mean.reshape(bias.shape)
    assert relative_error(layer(x), out - running) <= EXACT


@pytest.mark.parametrize("mean", ["mn", "mbn"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MBN + MN_RECURRENT)
def test_folds_into_the_bias_after_any_change(form: str, kind: str, mean: str) -> None:
    if kind not in (MN + MN_RECURRENT if mean == "mn" else MBN):
        pytest.skip("refused, see below")
    layer, x = perturb(normalized(form, kind, mean)), inputs(kind)
    for seed in range(3):
        layer(*inputs(kind, seed=seed))
    layer.eval()
    folded = layer.fold()
    assert relative_error(folded(*x), layer(*x)) <= EXACT
    assert type(folded) is type(plain_layer(kind))
    had_bias = getattr(plain_layer(kind), "bias", None) is not None or kind in MN_RECURRENT
    assert layer.gained_bias is not had_bias
    assert set(folded.state_dict()) == set(plain_layer(kind).state_dict()) | (
        {"bias"} if not had_bias else set()
    )
    assert not list(folded.buffers())


@pytest.mark.parametrize("mean", ["mn", "mbn"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MBN + MN_RECURRENT)
def test_inserting_and_calibrating_leaves_evaluation_alone(form: str, kind: str, mean: str) -> None:
    if kind not in (MN + MN_RECURRENT if mean == "mn" else MBN):
        pytest.skip("refused, see below")
    plain, x = plain_layer(kind).eval(), inputs(kind)
    layer = layer_class(form, type(plain)).from_plain(plain).eval()
    expected = flat(layer(*x)).detach()
    layer.normalize_mean(mean)
    assert relative_error(layer(*x), expected) <= EXACT
    batches = [inputs(kind, seed=seed) for seed in (5, 6)]
    with calibrate(layer), torch.no_grad():
        for batch in batches:
            layer(*batch)
    assert relative_error(layer(*x), expected) <= EXACT
    assert relative_error(layer.fold()(*x), expected) <= EXACT
    (running,) = layer.buffers()
    if mean == "mn":
        pooled = torch.stack([mean_of(b[0], layer.kind.channel).flatten() for b in batches]).mean(0)
    else:
        weight_only = layer_class(form, type(plain)).from_plain(plain)
        held = weight_only.composed_bias()
        outs = [mean_of(weight_only(*b), layer.kind.channel).flatten() for b in batches]
        pooled = torch.stack(outs).mean(0) - (0 if held is None else held)
    torch.testing.assert_close(running, pooled.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean", ["mn", "mbn"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "hf conv1d", "transposed2d", "lstm"])
def test_the_input_may_be_given_by_name(kind: str, mean: str) -> None:
    if kind == ("transposed2d" if mean == "mn" else "lstm"):
        pytest.skip("refused, see below")
    layer, twin = normalized("gmp", kind, mean).eval(), normalized("gmp", kind, mean).eval()
    (x,), name = inputs(kind), "x" if kind == "hf conv1d" else "input"
    with calibrate(layer), calibrate(twin), torch.no_grad():
        layer(**{name: x})
        twin(x)
    assert torch.equal(next(layer.buffers()), next(twin.buffers()))
    assert next(layer.buffers()).abs().sum() > 0
    for training in (False, True):
        layer.train(training)
        twin.train(training)
        assert torch.equal(flat(layer(**{name: x})), flat(twin(x)))


@pytest.mark.parametrize("mean", ["mn", "mbn"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d circular", "hf conv1d"])
def test_gradients_go_through_the_mean(form: str, kind: str, mean: str) -> None:
    layer, (x,) = normalized(form, kind, mean), inputs(kind)
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        fresh = copy.deepcopy(dict(layer.named_buffers()))
        return torch.func.functional_call(layer, dict(zip(named, values, strict=True)) | fresh, (x,))

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *named.values()), atol=1e-7, fast_mode=True)
    if (
        mean == "mn" and kind == "linear"
    ):  # a shift of all inputs changes nothing, so the gradient sums to zero
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert float(grad.sum(0).abs().max()) <= 1e-12 * float(grad.abs().max())


def test_mn_of_a_recurrent_layer_is_of_its_first_layers_input() -> None:
    layer, (x,) = normalized("gmp", "lstm", "mn"), inputs("lstm")
    plain = layer_class("gmp", nn.LSTM).from_plain(plain_layer("lstm"))
    assert relative_error(layer(x)[0], plain(x - x.mean((0, 1)))[0]) <= EXACT
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]))
    centered = packed._replace(data=packed.data - packed.data.mean(0))
    assert relative_error(layer(packed)[0].data, plain(centered)[0].data) <= EXACT


@pytest.mark.parametrize(
    ("kind", "mean", "reason"),
    [
        ("transposed2d", "mn", "depends on the position"),
        ("attention out", "mn", "never calls it"),
        ("attention out", "mbn", "never calls it"),
        ("attention", "mn", "a mean of their own"),
        ("lstm", "mbn", "feed its next step"),
        ("gru", "mn", "bias=True"),
        ("gru cell", "mn", "bias=True"),
        ("linear", "median", "one of mn, mbn"),
    ],
)
def test_refused_with_a_reason(kind: str, mean: str, reason: str) -> None:
    with pytest.raises(ReparamError, match=reason):
        normalized("gmp", kind, mean)


def test_refused_twice_or_without() -> None:
    layer = normalized("gmp", "linear", "mn")
    with pytest.raises(ReparamError, match="already"):
        layer.normalize_mean("mbn")
    with pytest.raises(ReparamError, match="place the scale before"):
        layer.leave_scale_out()
    with pytest.raises(ReparamError, match=r"shape \[3\], where the layer has \[7\]"):
        layer.set_mean(torch.zeros(3))
    plain = layer_class("gmp", nn.Linear).from_plain(plain_layer("linear"))
    with pytest.raises(ReparamError, match="call normalize_mean first"):
        plain.set_mean(torch.zeros(7))
    with pytest.raises(ReparamError, match=r"call model\.eval\(\)"), calibrate(layer):
        pass


def test_running_means_stay_wide_and_travel() -> None:
    layer = normalized("gmp", "conv2d", "mn").float().half()
    assert layer.running_input_mean.dtype == torch.float32
    assert list(layer.state_dict()) == ["r", "theta", "lambda_", "running_input_mean"]
    assert layer(inputs("conv2d", torch.float16)[0]).dtype == torch.float16
    assert torch.equal(copy.deepcopy(layer).running_input_mean, layer.running_input_mean)


def test_outside_scale_and_mean() -> None:
    plain, (x,) = plain_layer("conv2d"), inputs("conv2d")
    for mean in ("mn", "mbn"):
        inside = layer_class("gmp", nn.Conv2d).from_plain(plain).normalize_mean(mean)
        outside = layer_class("gmp", nn.Conv2d).from_plain(plain, scale_outside=True).normalize_mean(mean)
        r = outside.r.reshape(-1, 1, 1)
        assert relative_error(r * outside(x), inside(x)) <= EXACT
        value = inputs("linear")[0].reshape(-1)[: next(outside.buffers()).numel()]
        inside.eval(), outside.eval()
        before = outside(x)
        outside.set_mean(value)
        assert relative_error(outside(x), before) <= EXACT
        assert relative_error(outside.fold()(x), before) <= EXACT
        assert relative_error(outside.fold(scale=outside.r)(x), r * before) <= EXACT
