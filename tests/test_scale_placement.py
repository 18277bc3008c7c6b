"""The scale of GmP after the activation: where it may stand, that nothing changes, and that the model stays ordinary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import (
    MODELS,
    a_net,
    applied,
    moved,
    oracle,
    placed,
    sequential,
    tensors,
    to_gmp,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from reparam.graph import load_architecture
from reparam.graph.rewritten import Rewritten
from reparam.graph.rules.scale import place_scales

SAME_LOSS = 1e-10


@dataclass(frozen=True)
class Case:
    """A network of modules, and behind which one every scale has to stand; the others stay inside."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    places: dict[str, str] = field(default_factory=dict)


class Shared(nn.Module):
    """One ReLU at two places, in place, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.mark1, self.mark2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mark1(self.relu(self.conv1(x)))
        z = self.mark2(self.relu(self.conv2(y)))
        return self.relu(self.conv3(z) + y)


def resnet() -> nn.Module:
    args = {"blocks": "(1, 1, 1, 1)", "classes": "5", "stem": "imagenet", "batch_norm": "False"}
    return randomized(load_architecture(f"{MODELS / 'resnet.py'}:ResNet", args))


def vae() -> nn.Module:
    args = {"channels": "1", "size": "8", "width": "4", "latent": "3"}
    return randomized(load_architecture(f"{MODELS / 'conv_vae.py'}:ConvVAE", args))


CASES = {
    "conv relu pool conv": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(), pool=nn.MaxPool2d(2), conv2=nn.Conv2d(4, 3, 2)
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool"},
    ),
    "unbatched": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(), conv2=nn.Conv2d(4, 3, 2), relu2=nn.ReLU()
        ),
        ((2, 8, 8),),
        {"conv1": "relu1", "conv2": "relu2"},
    ),
    "in place, a pool not right behind": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(inplace=True), avg=nn.AvgPool2d(2), pool=nn.MaxPool2d(2)
        ),
        ((2, 2, 9, 9),),
        {"conv1": "relu1"},
    ),
    "leaky, prelu, dropout and identity before and behind": Case(
        lambda: sequential(
            conv1=nn.Conv1d(2, 4, 3),
            drop1=nn.Dropout(),
            id=nn.Identity(),
            act1=nn.PReLU(4),
            drop2=nn.Dropout(),
            conv2=nn.Conv1d(4, 4, 3),
            act2=nn.LeakyReLU(0.3, inplace=True),
            pool=nn.AdaptiveMaxPool1d(2),
            conv3=nn.Conv1d(4, 2, 1),
        ),
        ((3, 2, 12),),
        {"conv1": "act1", "conv2": "pool"},
    ),
    "three axes": Case(
        lambda: sequential(conv1=nn.Conv3d(2, 4, 2, groups=2), act=nn.ReLU(), pool=nn.MaxPool3d(2)),
        ((2, 2, 5, 5, 5),),
        {"conv1": "pool"},
    ),
    "transposed and grouped": Case(
        lambda: sequential(
            conv1=nn.ConvTranspose2d(4, 6, 3, groups=2), act1=nn.ReLU(), conv2=nn.Conv2d(6, 6, 2, groups=3)
        ),
        ((2, 4, 3, 3),),
        {"conv1": "act1"},
    ),
    "linear on the last axis": Case(
        lambda: sequential(fc1=nn.Linear(3, 4), act1=nn.ReLU(), fc2=Conv1D(5, 4), act2=nn.LeakyReLU(-0.5)),
        ((2, 4, 3),),
        {"fc1": "act1", "fc2": "act2"},
    ),
    "a pool over the units of a linear layer": Case(
        lambda: sequential(
            fc1=nn.Linear(3, 6), act=nn.ReLU(), pool=nn.MaxPool1d(3, 1, 1), fc2=nn.Linear(6, 2)
        ),
        ((2, 3),),
        {"fc1": "act"},
    ),
    "a pool over the units of a convolution": Case(
        lambda: sequential(conv1=nn.Conv1d(2, 4, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2), fc=nn.Linear(3, 2)),
        ((2, 2, 8),),
        {"conv1": "act"},
    ),
    "a shared activation": Case(
        lambda: randomized(Shared()), ((2, 2, 5, 5),), {"conv1": "mark1", "conv2": "mark2"}
    ),
    "ResNet": Case(
        resnet,
        ((2, 3, 33, 33),),
        {"conv1": "maxpool", **{f"layer{i}.0.conv1": f">layer{i}.0.conv2" for i in range(1, 5)}},
    ),
    "VAE": Case(
        vae,
        ((2, 1, 8, 8), (2, 3)),
        {"conv1": "relu1", "conv2": "relu2", "expand": "relu3", "deconv1": "relu4"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_placing_changes_nothing_and_r_may_change_sign_there(name: str) -> None:
    case = CASES[name]
    plain, x = case.build(), [noise(*shape) for shape in case.shapes]
    inside = to_gmp(plain)
    before = tensors(inside)
    model, outcomes = place_scales(copy.deepcopy(inside))
    assert isinstance(model, Rewritten)
    assert applied(outcomes) == set(case.places)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert difference(model, plain, *x) <= EXACT
    assert difference(moved(model), oracle(plain, model, case.places), *x) <= EXACT
    inside.load_state_dict(model.state_dict())
    assert difference(model, inside, *x) > 1e-3, "r < 0 makes no difference here"


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8))
        self.slope = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        c = self.convs
        x = F.relu(c[0](x))
        x = torch.relu(c[1](x))
        x = c[2](x).relu()
        x = c[3](x)
        y = F.relu_(x)
        x = F.max_pool2d(y, 3, 1, 1).reshape(y.size(0), 3, x.shape[2], x.size(3))
        x = torch.max_pool2d(F.leaky_relu(c[4](x), 0.2, inplace=True), 2, 1)
        x = F.prelu(c[5](x), self.slope)
        x = F.adaptive_max_pool2d(F.dropout(c[6](x), training=False).relu_(), 3)
        x, _ = F.max_pool2d(F.relu(input=c[7](x)), 2, return_indices=True)
        return x

    def scaled(self, x: Tensor, r: list[Tensor]) -> Tensor:
        """The same with the scales where they belong."""
        c, r = self.convs, [s.reshape(-1, 1, 1) for s in r]
        x = r[0] * c[0](x).clamp(min=0)
        x = r[1] * c[1](x).clamp(min=0)
        x = r[2] * c[2](x).clamp(min=0)
        x = r[3] * F.max_pool2d(c[3](x).clamp(min=0), 3, 1, 1)
        y = c[4](x)
        x = r[4] * F.max_pool2d(torch.where(y > 0, y, 0.2 * y), 2, 1)
        y = c[5](x)
        x = r[5] * torch.where(y > 0, y, self.slope.reshape(-1, 1, 1) * y)
        x = r[6] * F.adaptive_max_pool2d(c[6](x).clamp(min=0), 3)
        return F.max_pool2d(r[7] * c[7](x).clamp(min=0), 2)


def test_functions_and_methods() -> None:
    plain, x = randomized(Functional()), noise(2, 3, 7, 7)
    model, outcomes = place_scales(to_gmp(plain))
    assert len(applied(outcomes)) == 8
    assert difference(model, plain, x) <= EXACT
    moved(model)
    units = oracle(plain, model, {f"convs.{i}": "" for i in range(8)})
    units._forward_hooks.clear()
    with torch.no_grad():
        expected = units.scaled(x, [conv.r for conv in model.convs])
        assert float((model(x) - expected).abs().max() / expected.abs().max()) <= EXACT


def test_inside_and_outside_train_the_same_while_r_is_positive() -> None:
    inside = to_gmp(a_net())
    outside = placed(copy.deepcopy(inside))
    x = noise(8, 2, 8, 8)
    target = noise(8, 3, 2, 2, seed=4)
    losses: list[list[float]] = []
    for model in (inside, outside):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses.append([])
        for _ in range(6):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert all(bool((conv.r > 0).all()) for conv in (model.conv1, model.conv2))
    assert losses[0][-1] < losses[0][0] * 0.9
    assert max(abs(a - b) / a for a, b in zip(*losses, strict=True)) <= SAME_LOSS


def test_narrow_activations_stay_narrow() -> None:
    model = placed(to_gmp(a_net())).bfloat16()
    assert model.conv1.r.dtype == torch.float64
    x = noise(2, 2, 8, 8)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    wide = placed(to_gmp(a_net())).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.float()).dtype == torch.bfloat16
