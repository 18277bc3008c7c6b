"""Networks of the real checkpoints in shared/data, written after their authors' ONNX files: these show what keys do not.

A face detector (Linzaer, Ultra-Light-Fast-Generic-Face-Detector-1MB, version slim-320) and a voice detector (silero-vad,
16 kHz). Their keys are those of the checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution, each with its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


def head(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """The same without norms, and without an activation at its end."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1)
    )


class Slim320(nn.Module):
    """Input (N, 3, 240, 320); scores (N, 4420, 2) of background and face, and boxes (N, 4420, 4) before they are placed."""

    CHANNELS = (16, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256)
    STRIDES = (2, 1, 2, 1, 2, 1, 1, 1, 2, 1, 1, 2, 1)
    #: blocks behind which faces of one size are looked for, and anchors there
    SOURCES, ANCHORS = (8, 11, 13), (3, 2, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        pairs = zip(self.CHANNELS, self.CHANNELS[1:], self.STRIDES[1:], strict=False)
        self.base_net = nn.Sequential(first, *(separable(*pair) for pair in pairs))
        widths = [self.CHANNELS[i - 1] for i in self.SOURCES]
        self.extras = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(256, 64, 1), nn.ReLU(), head(64, 256, 2), nn.ReLU())]
        )

        def heads(values: int) -> nn.ModuleList:
            small = [head(w, n * values) for w, n in zip(widths, self.ANCHORS, strict=False)]
            return nn.ModuleList([*small, nn.Conv2d(256, self.ANCHORS[-1] * values, 3, 1, 1)])

        self.classification_headers, self.regression_headers = heads(2), heads(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sources = []
        for i, block in enumerate(self.base_net, 1):
            x = block(x)
            if i in self.SOURCES:
                sources.append(x)
        sources.append(self.extras[0](x))

        def found(heads: nn.ModuleList, values: int) -> Tensor:
            maps = [made(y).permute(0, 2, 3, 1) for made, y in zip(heads, sources, strict=True)]
            return torch.cat([y.reshape(y.shape[0], -1, values) for y in maps], 1)

        return found(self.classification_headers, 2).softmax(2), found(self.regression_headers, 4)


class SileroVad(nn.Module):
    """A chunk of sound (N, 576) and the state (2, N, 128) in; the chance (N, 1) that it is speech, and the state, out.

    The sampling rate ``sr`` is taken as by the authors' file, which adds 0 times it to the state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: Tensor, sr: Tensor | None = None) -> tuple[Tensor, Tensor]:
        spectrum = self.stft_conv(F.pad(x, (0, 64), mode="reflect").unsqueeze(1))
        y = (spectrum[:, :129].square() + spectrum[:, 129:].square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = conv(y).relu()
        h, c = self.lstm_cell(y.squeeze(2), (state[0], state[1]))
        chance = self.final_conv(h.unsqueeze(2).relu()).sigmoid().mean(2)
        state = torch.stack([h, c])
        return chance, state if sr is None else state + (sr * 0).to(state.dtype)
