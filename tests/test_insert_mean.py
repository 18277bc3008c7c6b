"""Means inserted into trained networks and calibrated: evaluation stays, and training subtracts them where it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, copied, difference, noise, outputs, randomized
from torch import Tensor, nn
from torch.nn import functional as F

from examples.models.conv_vae import ConvVAE
from examples.models.draw import draw
from reparam.errors import ReparamError
from reparam.graph import fold
from reparam.graph.exchange import replace_modules
from reparam.graph.rules.batch_norm import fold_batch_norms
from reparam.graph.rules.mean_norm import calibrate_means, insert_means
from reparam.layers import Reparameterized, layer_class

#: means and products of several hundred float64 numbers
CLOSE = 1e-11


def converted(model: nn.Module, form: str = "gmp") -> nn.Module:
    """A copy with every layer reparameterized that can be."""

    def new(module: nn.Module) -> nn.Module | None:
        cls = layer_class(form, type(module))
        return None if cls is None else cls.from_plain(module)

    return replace_modules(model, new)


def layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Reparameterized)]


CONVS: dict[str, dict[str, Any]] = {
    "padding 0": {},
    "padding 1": {"padding": 1},
    "padding 2": {"padding": 2},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "stride": {"padding": 1, "stride": 2},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"padding": 1, "groups": 2, "bias": False},
}


def network(options: dict[str, Any]) -> nn.Module:
    second = nn.Conv2d(4, 6, 3, **options)
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mn", "mbn"])
@pytest.mark.parametrize("form", ["gmp", "wn", "unit"])
@pytest.mark.parametrize("options", CONVS)
def test_insertion_calibration_and_folding_leave_evaluation_alone(form: str, options: str, kind: Any) -> None:
    plain, x = network(CONVS[options]), noise(2, 2, 9, 8)
    model = converted(plain, form)
    expected = copied(model) if form == "unit" else plain  # unit norm alone leaves its scale to other layers
    found = insert_means(model, kind, ["0", "2", "6"])
    assert [(o.layer, o.applied) for o in found] == [("0", True), ("2", True), ("6", True)]
    assert difference(model, expected, x) <= EXACT
    calibrated = calibrate_means(model, [noise(3, 2, 9, 8, seed=s) + 2 for s in (5, 6)])
    assert all(o.applied and o.why == "mean set from 2 batches" for o in calibrated)
    assert all(float(b.abs().max()) > 0.1 for b in model.buffers())
    assert difference(model, expected, x) <= EXACT
    assert difference(fold(model), expected, x) <= EXACT


@pytest.mark.parametrize("options", CONVS)
def test_training_subtracts_after_padding(options: str) -> None:
    plain = network(CONVS[options])
    model, x = converted(plain), noise(3, 2, 9, 8)
    insert_means(model, "mn", ["2"], momentum=0.25)
    model.train()
    hidden = plain[1](plain[0](x))
    conv, mean = plain[2], hidden.mean((0, 2, 3), keepdim=True)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(hidden, conv._reversed_padding_repeated_twice, mode=mode)
    after = F.conv2d(padded - mean, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    (found,), (expected,) = outputs(model, x), outputs(plain[3:], after)
    assert float((found - expected).abs().max() / expected.abs().max()) <= CLOSE
    torch.testing.assert_close(model[2].running_input_mean, 0.25 * mean.flatten(), rtol=CLOSE, atol=CLOSE)
    # The authors' position, before zero padding, is another function: at the border alone the results differ.
    before = conv(hidden - mean)
    bordered = conv.padding_mode == "zeros" and conv.padding not in (0, (0, 0))
    apart = (before - after).abs().amax((0, 1)) > 0.01
    assert bool(apart.any()) is bordered
    assert not apart[3:-3, 3:-3].any()


def test_means_are_those_of_the_data() -> None:
    plain = network(CONVS["same"])
    model = converted(plain)
    insert_means(model, "mn", ["0", "2", "6"])
    batches = [noise(2, 2, 9, 8), noise(3, 2, 9, 8, seed=4)]
    calibrate_means(model, batches)
    data = torch.cat(batches)
    for index in (0, 2, 6):
        seen = plain[:index](data)
        mean = seen.mean([axis for axis in range(seen.dim()) if axis != 1])
        torch.testing.assert_close(model[index].running_input_mean, mean, rtol=CLOSE, atol=CLOSE)


def test_gained_biases_are_said_and_frozen_layers_stay_frozen() -> None:
    plain = randomized(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2)))
    plain.requires_grad_(False)
    model = converted(plain)
    gained, kept = insert_means(model, "mn", ["0", "1"])
    assert gained.why == "the running mean is zero until calibrated, gained a bias"
    assert kept.why == "the running mean is zero until calibrated"
    calibrate_means(model, [noise(5, 3)])
    assert not any(p.requires_grad for p in model.parameters())
    assert set(fold(model).state_dict()) - set(plain.state_dict()) == {"0.bias"}


class Twice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(F.relu(self.first(x)))


def test_a_layer_called_twice_has_one_mean() -> None:
    plain = randomized(Twice())
    model = converted(plain)
    (found,) = insert_means(model, "mn", ["again", "first"])
    assert (found.layer, found.applied) == ("first", True)
    assert found.why.endswith("one mean for its 2 calls")
    data = noise(4, 3)
    (calibrated,) = calibrate_means(model, [data])
    assert calibrated.layer == "first"
    hidden = F.relu(plain.first(data)).detach()
    mean = torch.cat([data, hidden]).mean(0)
    torch.testing.assert_close(model.first.running_input_mean, mean, rtol=CLOSE, atol=CLOSE)
    assert difference(model, plain, noise(2, 3, seed=8)) <= EXACT


def test_transposed_convolutions_are_refused_the_rest_is_done() -> None:
    plain = randomized(ConvVAE(channels=1, size=8, width=3, latent=2))
    model = converted(plain)
    found = {o.layer: o for o in insert_means(model, "mn", layers(model))}
    assert [name for name, o in found.items() if not o.applied] == ["deconv1", "deconv2"]
    assert "depends on the position" in found["deconv1"].why
    x = noise(2, 1, 8, 8), noise(2, 2)
    assert all(o.applied for o in calibrate_means(model, [x, list(x), {"noise": x[1], "x": x[0]}]))
    assert difference(model, plain, *x) <= EXACT
    assert difference(fold(model), plain, *x) <= EXACT
    other = converted(plain)
    assert all(o.applied for o in insert_means(other, "mbn", layers(other)))
    calibrate_means(other, [x])
    assert difference(other, plain, *x) <= EXACT


def test_recurrent_states_are_not_normalized() -> None:
    plain = randomized(draw(size=6, steps=2, hidden=5, code=3, read=2, write=2))
    model = converted(plain)
    refused = {o.layer: o.why for o in insert_means(model, "mbn", layers(model)) if not o.applied}
    assert set(refused) == {"encoder", "decoder"}
    assert "feed its next step" in refused["encoder"]
    assert all(o.applied for o in insert_means(model, "mn", ["encoder", "decoder"]))
    x = noise(2, 1, 6, 6), noise(2, 2, 3)
    assert all(o.applied for o in calibrate_means(model, [x]))
    # The mean is that of what the cell reads; h and c, its other inputs, have none.
    assert model.encoder.running_input_mean.shape == (plain.encoder.input_size,)
    assert difference(model, plain, *x) <= EXACT
    assert difference(fold(model), plain, *x) <= EXACT


def test_attention_and_plain_layers_are_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "plain": nn.Linear(2, 2)}).double()
    model["attention"] = converted(model["attention"])
    found = {o.layer: o.why for o in insert_means(model, "mn", ["attention", "attention.out_proj", "plain"])}
    assert "a mean of their own" in found["attention"]
    assert "never calls it" in found["attention.out_proj"]
    assert found["plain"] == "Linear is not reparameterized: convert it first"
    assert not list(model.buffers())
    with pytest.raises(ReparamError, match=r"^ModuleDict has no layer `plane`$"):
        insert_means(model, "mn", ["plain", "plane"])


def test_a_shared_bias_takes_no_mean() -> None:
    model = converted(randomized(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    model[1].lambda_ = model[0].lambda_
    found = insert_means(model, "mn", ["0", "1"])
    assert [o.why for o in found] == [
        f"its bias, which would take up the mean, is shared with `{other}`" for other in (1, 0)
    ]
    model[1].lambda_ = nn.Parameter(model[0].lambda_.detach().clone())
    model[1].theta = model[0].theta
    assert all(o.applied for o in insert_means(model, "mn", ["0", "1"]))


def test_batch_norm_folded_first() -> None:
    plain = randomized(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()))
    model = copied(plain)
    fold_batch_norms(model)
    model = converted(model)
    insert_means(model, "mn", ["0"])
    calibrate_means(model, [noise(2, 2, 6, 6)])
    assert difference(model, plain, noise(3, 2, 5, 7)) <= EXACT


class Branches(nn.Module):
    """One of its layers is skipped, and which depends on the data: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x) if x.sum() > 0 else self.b(x))


def test_unreached_layers_are_named_and_modes_restored() -> None:
    model = converted(randomized(Branches()))
    insert_means(model, "mn", ["a", "b"])
    model.train()
    model.b.eval()
    reached, missed = calibrate_means(model, [noise(4, 3).abs()])
    assert (reached.layer, reached.applied, reached.why) == ("a", True, "mean set from 1 batch")
    assert (missed.layer, missed.applied) == ("b", False)
    assert missed.why == "none of 1 batch reached it: its mean stays"
    assert not model.b.running_input_mean.any()
    assert [m.training for m in (model, model.a, model.b, model.drop)] == [True, True, False, True]
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (list, "calibration has no data: give it at least one batch"),
        (lambda: [noise(2, 3), "text"], "calibration: a batch is a str: give a tensor"),
        (lambda: [noise(2, 3) * float("nan")], "`0` saw values whose mean is not finite"),
    ],
)
def test_bad_data_changes_nothing(batches: Callable[[], list[Any]], message: str) -> None:
    model = converted(randomized(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))))
    insert_means(model, "mn", ["0", "1"])
    before = copied(model).state_dict()
    with pytest.raises(ReparamError, match=message):
        calibrate_means(model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert calibrate_means(randomized(nn.Sequential(nn.Linear(3, 2))), []) == []
