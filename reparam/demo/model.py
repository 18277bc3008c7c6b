"""The small convolutional network of the demo, and the statistics its inputs are standardized with."""

import torch
from torch import nn

# Over all pixels, in [0, 1], of the 2,000 bundled training images (not of the full Fashion-MNIST).
MEAN = 0.2846
STD = 0.3530


class SmallCNN(nn.Module):
    """Three Conv-BN-ReLU stages, global average pooling, a linear head; 24,058 parameters for ten classes.

    Input: (N, 1, 28, 28) float, pixels in [0, 1] standardized by the caller with `MEAN` and `STD`.
    Output: (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        # No convolution bias: the batch norm that follows subtracts it again and has its own.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.relu3 = nn.ReLU()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))  # (N, 16, 14, 14)
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))  # (N, 32, 7, 7)
        x = self.global_pool(self.relu3(self.bn3(self.conv3(x))))  # (N, 64, 1, 1)
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


def small_cnn(num_classes: int = 10) -> nn.Module:
    """A freshly initialized `SmallCNN`: (N, 1, 28, 28) -> (N, num_classes); the demo's `--arch` target."""
    return SmallCNN(num_classes)
