"""Batch norm folded into the layer before it: the network's own evaluation pass in float64 is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, copied, difference, noise, randomized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

from examples.models.cifar_resnet import CifarResNet
from examples.models.resnet import ResNet
from reparam.graph.rules.batch_norm import FoldedBatchNorm, fold_batch_norms
from reparam.layers import LAYERS

PAIRS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4)], (3, 5)),
    "linear without bias": (lambda: [nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)], (3, 5)),
    "conv1d grouped": (lambda: [nn.Conv1d(4, 6, 3, groups=2, padding=1), nn.BatchNorm1d(6)], (2, 4, 7)),
    "conv2d": (lambda: [nn.Conv2d(3, 4, 3, 2, 1, 2, bias=False), nn.BatchNorm2d(4, eps=0.3)], (2, 3, 9, 8)),
    "conv2d depthwise": (lambda: [nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)], (2, 3, 5, 5)),
    "conv2d circular": (
        lambda: [nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)],
        (2, 3, 5, 5),
    ),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)], (2, 2, 3, 4, 3)),
    "transposed1d": (lambda: [nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 5)),
    "transposed2d grouped": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), nn.BatchNorm2d(6)],
        (2, 4, 3, 3),
    ),
    "transposed2d square": (lambda: [nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)], (2, 3, 3, 3)),
    "transposed3d grouped": (
        lambda: [nn.ConvTranspose3d(4, 4, 2, groups=2), nn.BatchNorm3d(4)],
        (2, 4, 2, 2, 3),
    ),
    "not affine": (lambda: [nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3, affine=False)], (2, 2, 4, 4)),
    "synchronized": (lambda: [nn.Conv2d(2, 3, 2), nn.SyncBatchNorm(3)], (2, 2, 4, 4)),
    "behind an identity": (lambda: [nn.Conv2d(2, 3, 2), nn.Identity(), nn.BatchNorm2d(3)], (2, 2, 4, 4)),
    "two in a row": (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)], (3, 5)),
}


class Net(nn.Module):
    """A convolution, a batch norm and a second convolution, put together by a function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1) if layer is None else layer
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)
        self.drop, self.id = nn.Dropout(0.5), nn.Identity()
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x))


def refused(model: nn.Module, *x: Tensor) -> list[str]:
    """The reasons of a model that must come out of the rule as it went in."""
    folded = copied(model)
    found = fold_batch_norms(folded)
    assert not any(outcome.applied for outcome in found)
    assert {k: v.tolist() for k, v in folded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert difference(folded, model, *x) == 0
    return [f"{outcome.layer}: {outcome.why}" for outcome in found]


@pytest.mark.parametrize("pair", PAIRS)
def test_folding_leaves_evaluation_alone(pair: str) -> None:
    build, shape = PAIRS[pair]
    model = randomized(nn.Sequential(*build(), nn.ReLU()))
    folded = copied(model)
    found = fold_batch_norms(folded)
    assert found
    assert all(outcome.applied and outcome.layer == "0" for outcome in found)
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    assert difference(folded, model, noise(*shape)) <= EXACT
    had_bias = model[0].bias is not None
    assert ("gained a bias" in found[0].why) is not had_bias
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}


def test_epsilon_decides_where_the_variance_is_tiny() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, eps=1e-3)))
    model[1].running_var.fill_(1e-9)
    model[1].weight.data[:2] = torch.tensor([0.0, -2.0])
    folded = copied(model)
    fold_batch_norms(folded)
    assert difference(folded, model, noise(2, 2, 4, 4)) <= EXACT
    scale = model[1].weight / (1e-9 + 1e-3) ** 0.5
    torch.testing.assert_close(
        folded[0].weight, model[0].weight * scale[:, None, None, None], rtol=EXACT, atol=0
    )


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: CifarResNet(blocks=1, classes=4), 7),
        (lambda: ResNet((1, 1, 1, 1), 4, "cifar", batch_norm=True), 12),
    ],
)
def test_residual_networks_fold_completely(model: Callable[[], nn.Module], count: int) -> None:
    whole = randomized(model())
    folded = copied(whole)
    found = fold_batch_norms(folded)
    assert [outcome.applied for outcome in found] == [True] * count
    assert found[1].layer == "layer1.0.conv1"
    assert found[1].why == "`layer1.0.bn1` folded in, gained a bias"
    assert type(folded) is type(whole)
    assert difference(folded, whole, noise(2, 3, 10, 9)) <= EXACT


def test_folded_keys_are_those_of_the_network_without_batch_norm() -> None:
    folded = randomized(ResNet((1, 1, 1, 1), 4, "cifar", batch_norm=True))
    fold_batch_norms(folded)
    ResNet((1, 1, 1, 1), 4, "cifar", batch_norm=False).load_state_dict(folded.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.bn(m.conv(m.conv(x))), "bn: `conv` is called 2 times"),
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "bn: `conv` is called 2 times"),
        (lambda m, x: m.bn(y := m.conv(x)) + y, "bn: the output of `conv` (Conv2d) is also taken by `add`"),
        (lambda m, x: m.bn(y := m.id(m.conv(x))) + y, "the output of `conv` (Conv2d) is also taken by `add`"),
        (lambda m, x: (m.bn(y := m.conv(x)), y), "also taken by `output`"),
        (
            lambda m, x: (F.relu_(y := m.conv(x)), m.bn(y))[1],
            "bn: the output of `conv` (Conv2d) is also taken by",
        ),
        (lambda m, x: m.bn(m.bn(m.conv(x))), "bn: `bn` is called 2 times"),
        (lambda m, x: m.bn(m.drop(m.conv(x))), "bn: dropout `drop` (Dropout) stands between"),
        (lambda m, x: m.bn(F.relu(m.conv(x))), "bn: it follows `relu`, no layer"),
        (lambda m, x: m.conv(m.bn(x)), "bn: it follows no layer"),
        (lambda m, x: m.conv(x), "bn: `bn` is never called"),
        (
            lambda m, x: m.bn(m.conv(x)) + m.conv.weight.sum(),
            "the parameters of `conv` are also read outside",
        ),
        (
            lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(),
            "the parameters of `bn` are also read outside",
        ),
        (lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x, ": torch.fx cannot trace Net"),
        (lambda m, x: m.bn(m.conv(x)) + m.training, "depends on its training mode"),
    ],
)
def test_refused_where_it_would_change_the_function(
    run: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    (found,) = refused(randomized(Net(run)), noise(2, 3, 5, 5))
    assert reason in found


def test_a_shape_that_is_read_does_not_stand_in_the_way() -> None:
    model = randomized(Net(lambda m, x: m.bn(y := m.conv(x)).reshape(y.size(0), -1)))
    folded = copied(model)
    (found,) = fold_batch_norms(folded)
    assert found.applied
    assert difference(folded, model, noise(2, 3, 5, 5)) <= EXACT


def hooked(module: nn.Module, *args: Any) -> None:
    """Changes nothing."""


def _set(change: Callable[[Any], Any]) -> nn.Module:
    model = randomized(Net(chain))
    change(model)
    return model.double().eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "bn", nn.BatchNorm2d(3, track_running_stats=False)), "no running statistics"),
        (
            lambda m: setattr(m.other, "weight", m.conv.weight),
            "`conv` shares parameters with `other`",
        ),
        (lambda m: setattr(m, "tied", m.conv.weight), "`conv` shares parameters with the model itself"),
        (lambda m: setattr(m.other, "bias", m.bn.bias), "`bn` shares parameters with `other`"),
        (lambda m: m.bn.register_forward_hook(hooked), "it has hooks, which would be lost"),
        (lambda m: m.bn.register_forward_pre_hook(hooked), "it has hooks, which would be lost"),
        (lambda m: m.bn.register_full_backward_hook(hooked), "it has hooks, which would be lost"),
        (lambda m: m.conv.register_forward_hook(hooked), "forward hooks of `conv`"),
        (lambda m: parametrizations.weight_norm(m.conv), "`conv` is parametrized by torch"),
        (lambda m: nn.utils.spectral_norm(m.conv), "computed by a hook of torch.nn.utils"),
        (
            lambda m: setattr(m, "conv", LAYERS["gmp", nn.Conv2d].from_plain(m.conv)),
            "is reparameterized already",
        ),
        (
            lambda m: setattr(m, "conv", nn.Linear(5, 5)),
            "BatchNorm2d(3) does not normalize the 5 units of `conv`",
        ),
        (
            lambda m: setattr(m, "conv", nn.Linear(5, 3)),
            "BatchNorm2d(3) does not normalize the 3 units of `conv`",
        ),
        (lambda m: setattr(m, "conv", nn.MaxPool2d(2)), "follows `conv` (MaxPool2d), no layer"),
    ],
)
def test_refused_for_what_the_modules_are(change: Callable[[Any], Any], reason: str) -> None:
    (found,) = refused(_set(change), noise(2, 3, 5, 5))
    assert found.startswith("bn: ")
    assert reason in found


def test_other_classes_are_left_alone() -> None:
    (found,) = fold_batch_norms(nn.Sequential(nn.Conv2d(2, 3, 2), nn.LazyBatchNorm2d()))
    assert found.why == "LazyBatchNorm2d is not one of torch's own batch norms: it may compute something else"
    assert fold_batch_norms(nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3))) == []


def test_values_that_overflow_are_refused() -> None:
    model = randomized(Net(chain)).half()
    model.bn.weight.data.fill_(6e4)
    (found,) = fold_batch_norms(model)
    assert (found.applied, found.why) == (
        False,
        "folded into `conv` it gives values that are not finite in torch.float16",
    )
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_training_mode_is_said() -> None:
    model = randomized(Net(chain))
    folded = copied(model).train()
    (found,) = fold_batch_norms(folded)
    assert found.why == "`bn` folded in, evaluation statistics used"
    assert folded.bn.training
    (found,) = fold_batch_norms(other := copied(model))
    assert (found.why, other.bn.training) == ("`bn` folded in", False)
    assert difference(folded.eval(), model, noise(2, 3, 5, 5)) <= EXACT


@pytest.mark.parametrize(
    ("weight", "beta", "affine", "gained"),
    [
        (False, True, True, True),
        (True, False, True, False),
        (True, True, False, True),
        (False, True, False, False),
    ],
)
def test_frozen_stays_frozen(weight: bool, beta: bool, affine: bool, gained: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine))
    model[0].weight.requires_grad_(weight)
    if affine:
        model[1].bias.requires_grad_(beta)
    fold_batch_norms(model)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (weight, gained)


def test_memory_format_dtype_and_rounding() -> None:
    model = randomized(Net(chain)).to(memory_format=torch.channels_last)
    oracle = copied(model)
    assert fold_batch_norms(oracle)[0].applied
    model.conv.half()  # a half layer under a float64 batch norm
    exact = model.conv.weight.double()
    scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
    fold_batch_norms(model)
    assert model.conv.weight.dtype == model.conv.bias.dtype == torch.float16
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv.weight, (exact * scale[:, None, None, None]).half())
    assert oracle.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_batch_norm_under_two_names_and_in_a_list() -> None:
    model = Net(lambda m, x: m.kept[0](m.conv(x)))
    model.kept = (model.bn,)
    model.alias = model.bn
    randomized(model)
    folded = copied(model)
    (found,) = fold_batch_norms(folded)
    assert found.why == "`bn` folded in"
    assert type(folded.alias) is type(folded.bn) is type(folded.kept[0]) is FoldedBatchNorm
    assert difference(folded, model, noise(2, 3, 5, 5)) <= EXACT


def test_layer_pre_hooks_stay() -> None:
    model = randomized(Net(chain))
    model.conv.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    folded = copied(model)
    assert fold_batch_norms(folded)[0].applied
    assert difference(folded, model, noise(2, 3, 5, 5)) <= EXACT
