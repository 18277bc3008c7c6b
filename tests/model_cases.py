"""A small network with a batch norm, in-place and functional activations, a pool and a transposed convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graph_cases import noise, randomized
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.layers import Reparameterized


class Net(nn.Module):
    """Batch norm, a functional and an in-place activation, dropout, a pool; it runs what ``run`` says."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.pool, self.drop = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.4)
        self.up, self.head = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Linear(3, 2)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(self, x)
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.drop(self.act(self.bn2(self.conv2(x))))
        return self.head(F.leaky_relu(self.up(x), 0.1).mean((2, 3)))


def net(run: Callable[[Any, Tensor], Tensor] | None = None) -> nn.Module:
    return randomized(Net(run))


def converted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, Reparameterized)}


X = noise(3, 2, 7, 9)
