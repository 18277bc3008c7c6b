"""ResNet-18 and ResNet-34; the latter is the GmP paper's ImageNet network.

Source: He et al. 2016, "Deep residual learning for image recognition", table 1, with projection shortcuts (option B)
where the shape changes; Chen & Ge (arXiv 2305.15912), section 5 "ImageNet (ILSVRC 2012)" and table 3. State-dict keys
and shapes are torchvision's, so its checkpoints load strict.
"""

import torch
from torch import nn


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))): (N, in, H, W) -> (N, out, H / stride, W / stride).

    The shortcut is the identity, or a 1×1 convolution (`downsample`) where the shape changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        bias = not batch_norm  # batch norm would subtract it again
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=bias)
        self.bn1 = _norm(channels, batch_norm)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=bias)
        self.bn2 = _norm(channels, batch_norm)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=bias)
            self.downsample = nn.Sequential(projection, _norm(channels, batch_norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        out: torch.Tensor = self.relu(residual + shortcut)
        return out


class ResNet(nn.Module):
    """A stem, four stages of 64, 128, 256, 512 channels, global average pooling, one linear layer.

    Input: (N, 3, H, W) float of any size, normalized by the caller; 224×224 in the papers.
    Output: (N, classes) logits.
    Parameters by default: ResNet-18 11,689,512, ResNet-34 21,797,672.
    torch.fx traces it.

    `stem` "imagenet" is a 7×7 convolution of stride 2 and a max-pool, "cifar" one 3×3 convolution of stride 1.
    Without batch norm the convolutions have biases instead, and its keys are missing: exactly what folding
    batch norm into the convolutions leaves.
    """

    def __init__(self, blocks: tuple[int, int, int, int], classes: int, stem: str, batch_norm: bool) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem is {stem!r}, expected 'imagenet' or 'cifar'")
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride, padding=kernel // 2, bias=not batch_norm)
        self.bn1 = _norm(64, batch_norm)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = self._stage(blocks[0], 64, 64, 1, batch_norm)
        self.layer2 = self._stage(blocks[1], 64, 128, 2, batch_norm)
        self.layer3 = self._stage(blocks[2], 128, 256, 2, batch_norm)
        self.layer4 = self._stage(blocks[3], 256, 512, 2, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(blocks: int, in_channels: int, channels: int, stride: int, batch_norm: bool) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, batch_norm)
        rest = [BasicBlock(channels, channels, 1, batch_norm) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(classes: int = 1000, stem: str = "imagenet", batch_norm: bool = True) -> ResNet:
    """A freshly initialized ResNet-18: (N, 3, 224, 224) -> (N, classes)."""
    return ResNet((2, 2, 2, 2), classes, stem, batch_norm)


def resnet34(classes: int = 1000, stem: str = "imagenet", batch_norm: bool = True) -> ResNet:
    """A freshly initialized ResNet-34: (N, 3, 224, 224) -> (N, classes)."""
    return ResNet((3, 4, 6, 3), classes, stem, batch_norm)
