"""ResNet-20 for CIFAR-10, keyed for the checkpoints of akamaster/pytorch_resnet_cifar10.

Source: He et al. 2016, section 4.2, with parameter-free shortcuts (option A). Keys are those of that repository once
the `module.` prefix its DataParallel left is stripped. Its images are in [0, 1], normalized with mean
(0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225): ImageNet's statistics, not CIFAR's.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))): (N, in, H, W) -> (N, out, H / stride, W / stride).

    Where the channels double, the shortcut takes every second pixel and pads the new channels with zeros, half of
    them before and half after.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        if self.stride != 1 or self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(residual + x)


class CifarResNet(nn.Module):
    """A 3×3 stem, three stages of 16, 32, 64 channels, global average pooling, one linear layer: 6·blocks + 2 layers.

    Input: (N, 3, H, W) float of any size, normalized as above; 32×32 in the paper.
    Output: (N, classes) logits.
    Parameters: 269,722 with three blocks a stage and ten classes.
    torch.fx traces it.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, stride=1)
        self.layer2 = self._stage(blocks, 16, 32, stride=2)
        self.layer3 = self._stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 16, 32, 32)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        x = F.adaptive_avg_pool2d(x, 1)
        logits: torch.Tensor = self.linear(x.flatten(1))
        return logits


def resnet20(classes: int = 10) -> CifarResNet:
    """A freshly initialized ResNet-20: (N, 3, 32, 32) -> (N, classes)."""
    return CifarResNet(blocks=3, classes=classes)
