"""One row a layer kind: a plain layer and inputs it takes. Every conformance test of the layers runs over these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

FORMS = ("gmp", "wn", "unit")

Shapes = tuple[tuple[int, ...], ...]


#: layers with one weight, each with the shape of its input
SINGLE: dict[str, tuple[Callable[[], nn.Module], Shapes]] = {
    "linear": (lambda: nn.Linear(7, 5), ((3, 7),)),
    "linear, no bias": (lambda: nn.Linear(7, 5, bias=False), ((2, 3, 7),)),
    "linear n=1": (lambda: nn.Linear(1, 4), ((3, 1),)),
    "attention out": (lambda: NonDynamicallyQuantizableLinear(6, 4), ((3, 6),)),
    "conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), ((2, 4, 9),)),
    "conv1d circular": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), ((2, 3, 8),)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=2), ((2, 3, 7, 8),)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), ((2, 4, 5, 6),)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), ((2, 2, 5, 5),)),
    "conv2d replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), ((2, 2, 5, 5),)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), ((2, 5, 5),)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1, groups=2), ((2, 2, 3, 4, 3),)),
    "transposed1d grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), ((2, 4, 5),)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, padding=1, output_padding=1),
        ((2, 4, 3, 3),),
    ),
    "transposed2d square": (lambda: nn.ConvTranspose2d(3, 3, 2, bias=False), ((2, 3, 3, 3),)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), ((2, 2, 2, 2, 3),)),
    "hf conv1d": (lambda: Conv1D(5, 4), ((2, 3, 4),)),
}

#: layers with several
SEVERAL: dict[str, tuple[Callable[[], nn.Module], Shapes]] = {
    "rnn": (lambda: nn.RNN(3, 4, nonlinearity="relu"), ((4, 2, 3),)),
    "lstm": (lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), ((4, 2, 3),)),
    "gru": (lambda: nn.GRU(3, 4, 2, batch_first=True, bias=False), ((2, 4, 3),)),
    "rnn cell": (lambda: nn.RNNCell(3, 4), ((2, 3),)),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), ((2, 3),)),
    "gru cell": (lambda: nn.GRUCell(3, 4, bias=False), ((2, 3),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), ((2, 3, 4),) * 3),
    "attention, three widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        ((3, 2, 4), (4, 2, 3), (4, 2, 5)),
    ),
}

KINDS = SINGLE | SEVERAL


def plain_layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The kind's plain layer with seeded weights, biases not zero."""
    torch.manual_seed(0)
    layer = KINDS[kind][0]().to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return layer


def inputs(kind: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, ...]:
    """What the kind's layer takes: seeded, of nonzero mean."""
    generator = torch.Generator().manual_seed(seed)
    shapes = KINDS[kind][1]
    made = [(torch.randn(s, generator=generator, dtype=torch.float64) + 0.7).to(dtype) for s in shapes]
    return (made[0],) * 3 if kind == "attention" else tuple(made)


def flat(value: Any) -> Tensor:
    """All tensors a layer returns, in one."""
    if isinstance(value, Tensor):
        return value.reshape(-1)
    return torch.cat([flat(part) for part in value if part is not None])


def relative_error(found: Any, expected: Any) -> float:
    with torch.no_grad():
        a, b = flat(found).double(), flat(expected).double()
        return float((a - b).norm() / b.norm())


def perturb(model: nn.Module, by: float = 0.5, seed: int = 2) -> nn.Module:
    """Random changes of every parameter, in place: radii of either sign occur."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=by)
    return model
