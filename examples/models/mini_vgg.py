"""The mini-VGG of the unit-norm blog, a CIFAR-10 network of exactly 1,250,858 parameters.

Source: R. Kotikalapudi, "Exploring alternative neural computational models" (raghakot.github.io, 2017): 3×3
convolutions with ReLU. The layers and dropout rates are those of the same author's code
(github.com/raghakot/deep-learning-experiments, exp2), there without convolution biases; with them, as here, the count
is the blog's to the unit.
"""

import torch
from torch import nn


class MiniVGG(nn.Module):
    """Four 3×3 convolutions, alternately same and valid, a max-pool after each pair, two dense layers.

    Input: (N, channels, size, size) float in [0, 1]; size ≥ 10.
    Output: (N, classes) logits.
    Parameters: 1,250,858 by default, 1,180,160 of them in `dense1`.
    torch.fx traces it.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=3, padding="same")
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 32, kernel_size=3, padding="valid")
        self.relu2 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.dropout1 = nn.Dropout(0.25)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding="same")
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(64, 64, kernel_size=3, padding="valid")
        self.relu4 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.dropout2 = nn.Dropout(0.25)
        after_pool1 = (size - 2) // 2
        after_pool2 = (after_pool1 - 2) // 2
        self.dense1 = nn.Linear(64 * after_pool2**2, 512)
        self.relu5 = nn.ReLU()
        self.dropout3 = nn.Dropout(0.5)
        self.dense2 = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))  # (N, 32, 30, 30)
        x = self.dropout1(self.pool1(x))  # (N, 32, 15, 15)
        x = self.relu4(self.conv4(self.relu3(self.conv3(x))))  # (N, 64, 13, 13)
        x = self.dropout2(self.pool2(x))  # (N, 64, 6, 6)
        x = self.dropout3(self.relu5(self.dense1(x.flatten(1))))
        logits: torch.Tensor = self.dense2(x)
        return logits


def mini_vgg(channels: int = 3, size: int = 32, classes: int = 10) -> MiniVGG:
    """A freshly initialized `MiniVGG`: (N, channels, size, size) -> (N, classes)."""
    return MiniVGG(channels, size, classes)
