"""A convolutional variational auto-encoder, its noise an input.

Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", with convolutions of stride 2 in the encoder and
their transposes in the decoder. Salimans & Kingma 2016, figure 3, normalize such a network on MNIST and CIFAR-10;
theirs is larger and residual.
"""

import torch
from torch import nn


class ConvVAE(nn.Module):
    """Encoder x -> (mean, log-variance) of q(z | x), sample z, decoder z -> logits of the pixels.

    Input: `x` (N, channels, size, size) float in [0, 1], `size` a multiple of 4; `noise` (N, latent), standard normal
    in training, zeros to reconstruct from the mean.
    Output: reconstruction logits (N, channels, size, size), mean (N, latent), log-variance (N, latent).
    Parameters: 370,945 by default.
    torch.fx traces it: with the noise given, the same inputs give the same outputs in either mode.
    """

    def __init__(self, channels: int, size: int, width: int, latent: int) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"size is {size}, expected a multiple of 4: two strides of 2 must undo exactly")
        inner = (2 * width, size // 4, size // 4)
        flat = 2 * width * (size // 4) ** 2
        self.conv1 = nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.mean = nn.Linear(flat, latent)
        self.log_variance = nn.Linear(flat, latent)

        self.expand = nn.Linear(latent, flat)
        self.relu3 = nn.ReLU()
        self.unflatten = nn.Unflatten(1, inner)
        self.deconv1 = nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1)
        self.relu4 = nn.ReLU()
        self.deconv2 = nn.ConvTranspose2d(width, channels, kernel_size=4, stride=2, padding=1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, channels, size, size) -> mean and log-variance, (N, latent) each."""
        x = self.relu1(self.conv1(x))  # (N, width, size / 2, size / 2)
        x = self.relu2(self.conv2(x)).flatten(1)
        return self.mean(x), self.log_variance(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(N, latent) -> logits (N, channels, size, size)."""
        x = self.unflatten(self.relu3(self.expand(z)))  # (N, 2 · width, size / 4, size / 4)
        x = self.relu4(self.deconv1(x))
        logits: torch.Tensor = self.deconv2(x)
        return logits

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encode(x)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decode(z), mean, log_variance


def conv_vae(channels: int = 1, size: int = 28, width: int = 32, latent: int = 32) -> ConvVAE:
    """A freshly initialized `ConvVAE`; the default takes MNIST-sized images."""
    return ConvVAE(channels, size, width, latent)
