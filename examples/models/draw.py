"""DRAW: a recurrent auto-encoder that reads and writes an image through a moving window of Gaussian filters.

Source: Gregor et al. 2015, "DRAW: A Recurrent Neural Network For Image Generation", equations 3-8 (the step) and 19-29
(the attention), with the sizes of table 3 for MNIST: 256 LSTM units, a code of 100, a 2×2 read and a 5×5 write window.
The paper takes 64 steps; the default here is 10, which changes no parameter. The state starts at zero.
"""

from typing import NamedTuple

import torch
from torch import nn


class State(NamedTuple):
    """What one step hands to the next: canvas (N, channels, size, size), the LSTMs' h and c (N, hidden) each."""

    canvas: torch.Tensor
    encoder_h: torch.Tensor
    encoder_c: torch.Tensor
    decoder_h: torch.Tensor
    decoder_c: torch.Tensor


class GaussianWindow(nn.Module):
    """A `window`×`window` grid of Gaussian filters over a `size`×`size` image, placed by the decoder (eq. 19-26).

    Input: h (N, hidden).
    Output: the row and column filters F_Y, F_X (N, window, size), each row summing to 1, and the gain γ (N, 1, 1, 1).
    """

    # Not parameters and not in the state dict, but they follow `.to()` and `.double()`.
    pixel: torch.Tensor
    offset: torch.Tensor

    def __init__(self, hidden: int, window: int, size: int) -> None:
        super().__init__()
        self.window, self.size = window, size
        self.placement = nn.Linear(hidden, 5)
        pixel = torch.arange(1.0, size + 1)
        offset = torch.arange(1.0, window + 1) - window / 2 - 0.5
        self.register_buffer("pixel", pixel, persistent=False)
        self.register_buffer("offset", offset.unsqueeze(1), persistent=False)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, log_variance, log_stride, log_gain = self.placement(h).unsqueeze(2).chunk(5, dim=1)  # (N, 1, 1)
        stride = (self.size - 1) / (self.window - 1) * log_stride.exp()

        def filters(centre: torch.Tensor) -> torch.Tensor:
            centre = (self.size + 1) / 2 * (centre + 1)  # from [-1, 1] to pixels 1..size
            mean = centre + self.offset * stride  # (N, window, 1)
            bell = torch.exp(-((self.pixel - mean) ** 2) / (2 * log_variance.exp()))
            # A window far outside the image sees nothing; it must not divide by zero.
            return bell / bell.sum(dim=2, keepdim=True).clamp(min=1e-8)

        return filters(y), filters(x), log_gain.exp().unsqueeze(3)


class Draw(nn.Module):
    """`steps` times: read where the decoder looks, encode, sample a code, decode, add what it writes to the canvas.

    Input: `x` (N, channels, size, size) float in [0, 1]; `noise` (N, steps, code), standard normal in training.
    Output: canvas logits (N, channels, size, size) after the last step, and mean and log standard deviation of every
    step's code, (N, steps, code) each.
    Parameters: 961,515 by default.
    torch.fx traces it with the steps unrolled: `steps` and the sizes are constants of the graph, N is not.
    """

    def __init__(
        self, channels: int, size: int, steps: int, hidden: int, code: int, read: int, write: int
    ) -> None:
        super().__init__()
        if min(read, write) < 2:
            raise ValueError(
                f"windows are {read} and {write}, expected 2 or more: the stride divides by window - 1"
            )
        self.steps, self.hidden = steps, hidden
        self.read_window = GaussianWindow(hidden, read, size)
        self.encoder = nn.LSTMCell(2 * channels * read**2 + hidden, hidden)
        self.mean = nn.Linear(hidden, code)
        self.log_deviation = nn.Linear(hidden, code)
        self.decoder = nn.LSTMCell(code, hidden)
        self.patch = nn.Linear(hidden, channels * write**2)
        self.unflatten = nn.Unflatten(1, (channels, write, write))
        self.write_window = GaussianWindow(hidden, write, size)

    def read(self, x: torch.Tensor, error: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """γ·[F_Y x F_Xᵀ, F_Y x̂ F_Xᵀ] (eq. 27): two images to (N, 2 · channels · read²)."""
        rows, columns, gain = self.read_window(h)
        both = torch.cat([x, error], dim=1)
        glimpse = rows.unsqueeze(1) @ both @ columns.transpose(1, 2).unsqueeze(1)
        return torch.flatten(gain * glimpse, start_dim=1)

    def write(self, h: torch.Tensor) -> torch.Tensor:
        """F_Yᵀ w F_X / γ (eq. 28-29): (N, hidden) to (N, channels, size, size)."""
        rows, columns, gain = self.write_window(h)
        patch = self.unflatten(self.patch(h))
        painted: torch.Tensor = rows.transpose(1, 2).unsqueeze(1) @ patch @ columns.unsqueeze(1) / gain
        return painted

    def step(
        self, x: torch.Tensor, noise: torch.Tensor, state: State
    ) -> tuple[State, torch.Tensor, torch.Tensor]:
        """One step (eq. 3-8) with noise (N, code): the next state, the code's mean and log standard deviation."""
        canvas, encoder_h, encoder_c, decoder_h, decoder_c = state
        glimpse = self.read(x, x - torch.sigmoid(canvas), decoder_h)
        encoder_h, encoder_c = self.encoder(torch.cat([glimpse, decoder_h], dim=1), (encoder_h, encoder_c))
        mean, log_deviation = self.mean(encoder_h), self.log_deviation(encoder_h)
        decoder_h, decoder_c = self.decoder(mean + log_deviation.exp() * noise, (decoder_h, decoder_c))
        canvas = canvas + self.write(decoder_h)
        return State(canvas, encoder_h, encoder_c, decoder_h, decoder_c), mean, log_deviation

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zeros = x.new_zeros(x.shape[0], self.hidden)
        state = State(torch.zeros_like(x), zeros, zeros, zeros, zeros)
        means, log_deviations = [], []
        for index in range(self.steps):
            state, mean, log_deviation = self.step(x, noise[:, index], state)
            means.append(mean)
            log_deviations.append(log_deviation)
        return state.canvas, torch.stack(means, dim=1), torch.stack(log_deviations, dim=1)


def draw(
    channels: int = 1,
    size: int = 28,
    steps: int = 10,
    hidden: int = 256,
    code: int = 100,
    read: int = 2,
    write: int = 5,
) -> Draw:
    """A freshly initialized `Draw`; the default takes MNIST-sized images. `steps=1` is the bare cell."""
    return Draw(channels, size, steps, hidden, code, read, write)
