"""Networks whose ONNX files take other weights, and checkpoints of them in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam.checkpoint import save_state_dict
from reparam.graph import convert, records_of

THIS = Path(__file__)


class Residual(nn.Module):
    """A strided convolution, a grouped one, a shortcut around it, a linear layer; with batch norms or with biases."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()

        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=not batch_norm)
        self.bn1 = norm(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=not batch_norm)
        self.bn2 = norm(8)
        self.conv3 = nn.Conv2d(8, 8, 1, bias=not batch_norm)
        self.bn3 = norm(8)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = self.relu(self.bn2(self.conv2(x)))
        y = self.relu(self.bn3(self.conv3(y)) + x)
        return self.fc(y.mean((2, 3)))


class Reader(nn.Module):
    """A recurrent layer that reads both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def bare() -> nn.Module:
    return Residual(batch_norm=False)


def normed() -> nn.Module:
    return Residual(batch_norm=True)


def reader() -> nn.Module:
    return Reader()


def chain() -> nn.Module:
    """Signs of its first layer can be pushed into the second."""
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))


IMAGE, SEQUENCE, ROW = "N,3,16,16", "N,5,6", "N,4"


def arch(name: str) -> str:
    """``--arch`` of a network of this file."""
    return f"{THIS}:{name}"


def moved(model: nn.Module, seed: int, negative: str | None = None) -> nn.Module:
    """In place, as after training: all values others, statistics too; r positive, but for one unit of ``negative``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if not x.is_floating_point():
                continue
            noise = torch.randn(x.shape, generator=generator) * 0.3
            x.add_(noise)
            if key.endswith((".r", "running_var")):
                x.abs_().add_(0.05)
            if key == f"{negative}.r":
                x[0] = -x[0]
    return model.eval()


def trained(build: Any, seed: int) -> nn.Module:
    """A plain network with values nothing is blind to."""
    torch.manual_seed(0)
    return moved(build(), seed)


def checkpoint(path: Path, model: nn.Module, **form: Any) -> nn.Module:
    """Write the network of ``form`` made of ``model``, moved since; the network."""
    negative = form.pop("negative", None)
    held = moved(convert(model, **form), 7, negative) if form else model
    save_state_dict(held.state_dict(), records_of(held), path, force=True)
    return held


class Derived(nn.Module):
    """One weight used as it is and, in the exporter's hands, as another array that was computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.gamma).relu() * (1 + self.gamma)


class Single(nn.Module):
    """The same of a single value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.temperature).relu() * (1 + self.temperature)


class Tabled(nn.Module):
    """Constants: an array that is no weight, a single value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(-1.0, 1.0, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + self.table).relu() * 0.7


def derived() -> nn.Module:
    return Derived()


def single() -> nn.Module:
    return Single()


def tabled() -> nn.Module:
    return Tabled()
