"""The networks of examples/models with sizes known from elsewhere, their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from support import ROOT
from torch import Tensor, nn

from reparam.graph import load_architecture

MODELS = ROOT / "examples" / "models"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One network: inputs and outputs without their batch axis."""

    ref: str
    parameters: int
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    args: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        return " ".join([self.ref, *(f"{key}={value}" for key, value in self.args)])

    def build(self) -> nn.Module:
        return load_architecture(str(MODELS / self.ref), dict(self.args)).eval()

    def sample(self, batch: int, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand((batch, *shape), generator=generator) for shape in self.inputs]


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    """Parameters of a convolution of square kernel, as a textbook counts them."""
    return outputs * (inputs * kernel**2 + bias)


def dense(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


def lstm(inputs: int, hidden: int) -> int:
    """Four gates, each reading the input and the state; torch keeps two biases a gate."""
    return 4 * hidden * (inputs + hidden + 2)


VGG_CONVS = [(3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
VGG = sum(conv(i, o, 3) for i, o in VGG_CONVS)
CONVPOOL_CONVS = [(3, 96), (96, 96), (96, 96), (96, 192), (192, 192), (192, 192)]
# He et al., table 6, say 0.27 M. A batch norm has two numbers a channel.
RESNET20 = (
    conv(3, 16, 3, False)
    + 6 * conv(16, 16, 3, False)
    + conv(16, 32, 3, False)
    + 5 * conv(32, 32, 3, False)
    + conv(32, 64, 3, False)
    + 5 * conv(64, 64, 3, False)
    + 2 * (7 * 16 + 6 * 32 + 6 * 64)
    + dense(64, 10)
)
VAE = (
    conv(1, 32, 4)
    + conv(32, 64, 4)
    + 2 * dense(3136, 32)
    + dense(32, 3136)
    + conv(64, 32, 4)
    + conv(32, 1, 4)
)
# A read gives 2·2·2 numbers, a write takes 5·5, each window is placed by five.
DRAW = lstm(8 + 256, 256) + lstm(100, 256) + 2 * dense(256, 100) + dense(256, 25) + 2 * dense(256, 5)
DEFAULTS = [
    Case("mlp.py:mlp", 1_501, ((13,),), ((1,),)),
    Case("vgg6.py:vgg6", VGG + dense(512, 1000), ((3, 32, 32),), ((1000,),)),
    # torchvision's documented counts.
    Case("resnet.py:resnet18", 11_689_512, ((3, 224, 224),), ((1000,),)),
    Case("resnet.py:resnet34", 21_797_672, ((3, 224, 224),), ((1000,),)),
    Case("cifar_resnet.py:resnet20", RESNET20, ((3, 32, 32),), ((10,),)),
    Case(
        "convpool_cnn_c.py:convpool_cnn_c",
        sum(conv(i, o, 3) for i, o in CONVPOOL_CONVS) + dense(192 * 8 * 8, 512) + dense(512, 10),
        ((3, 32, 32),),
        ((10,),),
    ),
    # The blog's own figure.
    Case("mini_vgg.py:mini_vgg", 1_250_858, ((3, 32, 32),), ((10,),)),
    Case(
        "dqn.py:dqn",
        conv(4, 32, 8) + conv(32, 64, 4) + conv(64, 64, 3) + dense(3136, 512) + dense(512, 6),
        ((4, 84, 84),),
        ((6,),),
    ),
    Case("conv_vae.py:conv_vae", VAE, ((1, 28, 28), (32,)), ((1, 28, 28), (32,), (32,))),
    Case("draw.py:draw", DRAW, ((1, 28, 28), (10, 100)), ((1, 28, 28), (10, 100), (10, 100))),
]
OPTIONS = [
    Case("mlp.py:mlp", dense(1, 10) + dense(10, 1), ((1,),), ((1,),), (("inputs", "1"), ("hidden", "10"))),
    Case(
        "vgg6.py:vgg6",
        VGG + dense(512, 10) + 2 * 2 * (128 + 256 + 512),
        ((3, 40, 24),),
        ((10,),),
        (("batch_norm", "True"), ("classes", "10")),
    ),
    # The widely used CIFAR versions with a 3×3 stem and ten classes.
    Case("resnet.py:resnet18", 11_173_962, ((3, 32, 32),), ((10,),), (("stem", "cifar"), ("classes", "10"))),
    Case("resnet.py:resnet34", 21_282_122, ((3, 32, 32),), ((10,),), (("stem", "cifar"), ("classes", "10"))),
    # Two numbers a channel of batch norm become one of bias: 4,800 and 8,512 channels.
    Case("resnet.py:resnet18", 11_689_512 - 4_800, ((3, 64, 64),), ((1000,),), (("batch_norm", "False"),)),
    Case("resnet.py:resnet34", 21_797_672 - 8_512, ((3, 33, 65),), ((1000,),), (("batch_norm", "False"),)),
    Case("dqn.py:dqn", 1_693_362, ((4, 84, 84),), ((18,),), (("actions", "18"),)),
    Case(
        "conv_vae.py:conv_vae",
        conv(3, 32, 4)
        + conv(32, 64, 4)
        + 2 * dense(4096, 8)
        + dense(8, 4096)
        + conv(64, 32, 4)
        + conv(32, 3, 4),
        ((3, 32, 32), (8,)),
        ((3, 32, 32), (8,), (8,)),
        (("channels", "3"), ("size", "32"), ("latent", "8")),
    ),
    Case(
        "draw.py:draw",
        DRAW + 4 * 256 * 2 * 2 * 2**2 + 2 * dense(256, 25),
        ((3, 20, 20), (2, 100)),
        ((3, 20, 20), (2, 100), (2, 100)),
        (("channels", "3"), ("size", "20"), ("steps", "2")),
    ),
]


@cache
def cached(case: Case) -> nn.Module:
    """Built once with seed 0; only read."""
    torch.manual_seed(0)
    return case.build()


@torch.no_grad()
def outputs(model: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = model(*inputs)
    return out if isinstance(out, tuple) else (out,)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def changed(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter drawn anew, so that no zero of an initialization hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
