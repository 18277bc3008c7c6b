"""ConvPool-CNN-C as the weight normalization slides modify it, a CIFAR-10 network.

Source: W. Qu, "Weight Normalization for Neural Networks" (Columbia MATHGR5430, 2023), the slide "Base model: modified
ConvPool-CNN-C". The first two stages are those of Salimans & Kingma 2016, section 5.1, and so of Springenberg et al.
2015; Flatten, Dense 512 and Dense replace their third stage and global average pooling.
"""

from collections import OrderedDict

import torch
from torch import nn

# The slides write only `lrelu`; 0.1 is its slope in the weight normalization authors' code (openai/weightnorm).
LEAKY_SLOPE = 0.1
NOISE_STDDEV = 0.15


class GaussianNoise(nn.Module):
    """x + stddev·N(0, 1) in training, x in evaluation, as the Keras layer of that name; any shape."""

    def __init__(self, stddev: float) -> None:
        super().__init__()
        self.stddev = stddev

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.stddev * torch.randn_like(x) if self.training else x


class ConvPoolCNNC(nn.Module):
    """Noise, two stages of three 3×3 leaky-ReLU convolutions with max-pool and dropout, two dense layers.

    Input: (N, channels, size, size) float, whitened or standardized by the caller; `size` a multiple of 4.
    Output: (N, classes) logits; the slides' softmax belongs to the loss.
    Parameters: 7,295,882 by default, 6,291,968 of them in `dense1`.
    torch.fx traces it, but writes the noise into the graph in the mode the network is in, and no later `eval()`
    takes it out: call `eval()` first.

    `dense1` reads (channel, row, column); the columns of a Keras checkpoint come as (row, column, channel).
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"size is {size}, expected a multiple of 4: two max-pools halve it")
        layers: OrderedDict[str, nn.Module] = OrderedDict(noise=GaussianNoise(NOISE_STDDEV))
        for stage, width in enumerate((96, 192), start=1):
            for index in range(3 * stage - 2, 3 * stage + 1):
                layers[f"conv{index}"] = nn.Conv2d(channels, width, kernel_size=3, padding="same")
                layers[f"lrelu{index}"] = nn.LeakyReLU(LEAKY_SLOPE)
                channels = width
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            layers[f"dropout{stage}"] = nn.Dropout(0.5)
        self.features = nn.Sequential(layers)
        self.dense1 = nn.Linear(channels * (size // 4) ** 2, 512)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.dense2 = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x).flatten(1)  # (N, 192 · size/4 · size/4)
        x = self.dropout(self.relu(self.dense1(x)))
        logits: torch.Tensor = self.dense2(x)
        return logits


def convpool_cnn_c(channels: int = 3, size: int = 32, classes: int = 10) -> ConvPoolCNNC:
    """A freshly initialized `ConvPoolCNNC`: (N, channels, size, size) -> (N, classes)."""
    return ConvPoolCNNC(channels, size, classes)
