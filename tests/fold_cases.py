"""Networks whose scales stand after activations, and where the signs of these go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from graph_cases import randomized
from scale_oracle import MODELS, sequential, to_gmp
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from reparam.graph import load_architecture
from reparam.graph.rules.scale import place_scales


@dataclass(frozen=True)
class Case:
    """A network of modules.

    Attributes:
        places: layer -> module behind which its scale stands.
        pushed: layer -> where the signs of its r go.
        remains: layer -> why its signs stay.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    places: dict[str, str]
    pushed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remains: dict[str, str] = field(default_factory=dict)


class Block(nn.Module):
    """Two consumers of one result, in the way ``joined`` says."""

    def __init__(self, joined: str) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.conv1(x))
        if self.joined == "convs":
            return self.conv2(y) + self.conv3(y)
        if self.joined == "residual":
            return self.conv2(y) + y
        if self.joined == "twice":
            return self.conv2(self.conv2(y))
        if self.joined == "concatenated":
            return self.conv3(self.conv2(torch.cat([y[:, :2], y[:, 2:]], 1)))
        if self.joined == "read":
            return self.conv2(y) + F.conv2d(y, self.conv3.weight)
        if self.joined == "functional":
            return self.conv2(F.avg_pool2d(F.dropout(y, training=False), 3, 1, 1))
        assert self.joined == "output"
        return y


def resnet() -> nn.Module:
    args = {"blocks": "(1, 1, 1, 1)", "classes": "5", "stem": "imagenet", "batch_norm": "False"}
    return randomized(load_architecture(f"{MODELS / 'resnet.py'}:ResNet", args))


def vae() -> nn.Module:
    args = {"channels": "1", "size": "8", "width": "4", "latent": "3"}
    return randomized(load_architecture(f"{MODELS / 'conv_vae.py'}:ConvVAE", args))


def tied() -> nn.Module:
    model = sequential(
        conv1=nn.Conv2d(3, 3, 1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(3, 3, 1),
        tanh=nn.Tanh(),
        conv3=nn.Conv2d(3, 3, 1),
    )
    model.conv3.weight = model.conv2.weight
    return model


def block(joined: str, shape: tuple[int, ...] = (2, 2, 5, 5), **expected: dict[str, object]) -> Case:
    return Case(lambda: randomized(Block(joined)), (shape,), {"conv1": "relu1"}, **expected)


def stopped(at: str, place: str = "relu1", **between: nn.Module) -> Case:
    """Two convolutions: the signs of the first get as far as the module ``at``, its scale stands behind ``place``."""

    def build() -> nn.Module:
        first = {"conv1": nn.Conv2d(2, 4, 3), "relu1": nn.ReLU()}
        return sequential(**first, **copy.deepcopy(between), conv2=nn.Conv2d(4, 3, 2))

    return Case(build, ((2, 2, 8, 8),), {"conv1": place}, remains={"conv1": f"`{at}`"})


CASES = {
    "conv relu pool conv": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 4, 2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc=nn.Linear(16, 3),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool", "conv2": "relu2"},
        {"conv1": ("conv2",), "conv2": ("fc",)},
    ),
    "pool, flatten, linear": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            relu1=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(36, 5),
            relu2=nn.ReLU(),
            fc2=nn.Linear(5, 3),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool", "fc1": "relu2"},
        {"conv1": ("fc1",), "fc1": ("fc2",)},
    ),
    "average pool, dropout, flatten, linear": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            act=nn.LeakyReLU(0.2),
            avg=nn.AvgPool2d(2),
            drop=nn.Dropout(),
            all=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "act"},
        {"conv1": ("fc",)},
    ),
    "grouped and depthwise": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            act1=nn.PReLU(4),
            conv2=nn.Conv2d(4, 6, 3, groups=2),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(6, 12, 2, groups=6, padding=1, padding_mode="reflect"),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "act1", "conv2": "act2"},
        {"conv1": ("conv2",), "conv2": ("conv3",)},
    ),
    "transposed and grouped": Case(
        lambda: sequential(
            conv1=nn.ConvTranspose2d(4, 6, 3, groups=2),
            act1=nn.ReLU(),
            conv2=nn.ConvTranspose2d(6, 9, 2, 2, groups=3),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(9, 3, 1),
        ),
        ((2, 4, 3, 3),),
        {"conv1": "act1", "conv2": "act2"},
        {"conv1": ("conv2",), "conv2": ("conv3",)},
    ),
    "other kinds": Case(
        lambda: sequential(
            fc1=nn.Linear(3, 4),
            act1=nn.ReLU(),
            fc2=Conv1D(5, 4),
            act2=nn.ReLU(),
            fc3=Conv1D(6, 5),
            act3=nn.ReLU(),
            conv=nn.Conv1d(6, 2, 1),
        ),
        ((2, 6, 3),),
        {"fc1": "act1", "fc2": "act2", "fc3": "act3"},
        {"fc1": ("fc2",), "fc2": ("fc3",)},
        {"fc3": "does not take its units as input channels"},
    ),
    "a max-pool behind an average": stopped("pool", avg=nn.AvgPool2d(2, 1), pool=nn.MaxPool2d(2)),
    "two max-pools": stopped("pool2", "pool1", pool1=nn.MaxPool2d(2, 1), pool2=nn.MaxPool2d(2)),
    "another activation": stopped("act", act=nn.LeakyReLU(0.3)),
    "batch norm": stopped("bn", bn=nn.BatchNorm2d(4)),
    "tied": Case(tied, ((2, 3, 4, 4),), {"conv1": "relu1"}, remains={"conv1": "shares parameters"}),
    "two convolutions": block("convs", pushed={"conv1": ("conv2", "conv3")}),
    "functions between": block("functional", pushed={"conv1": ("conv2",)}),
    "residual": block("residual", remains={"conv1": "residual"}),
    "called twice": block("twice", remains={"conv1": "called 2 times"}),
    "concatenated": block("concatenated", remains={"conv1": "getitem"}),
    "read": block("read", remains={"conv1": "conv2d"}),
    "output": block("output", remains={"conv1": "its output leaves the network"}),
    "VAE": Case(
        vae,
        ((2, 1, 8, 8), (2, 3)),
        {"conv1": "relu1", "conv2": "relu2", "expand": "relu3", "deconv1": "relu4"},
        {"conv1": ("conv2",), "conv2": ("mean", "log_variance"), "deconv1": ("deconv2",)},
        {"expand": "unflatten"},
    ),
}
#: converted in one layer alone
ALONE = {"tied": "conv1", "read": "conv1", "batch norm": "conv1"}


def placed(plain: nn.Module, alone: str | None = None) -> nn.Module:
    """Converted, all or one layer, every scale placed that can be."""
    chosen = plain.get_submodule(alone) if alone else None
    return place_scales(to_gmp(plain, lambda module: chosen is None or module is chosen))[0]
