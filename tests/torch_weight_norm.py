"""torch's two weight norms, and modules to wrap in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

#: torch composes g·(v/‖v‖) in float32, the norm of up to 200 numbers too
TORCH_FLOAT32 = 3e-7


def wrap_old(module: nn.Module, name: str = "weight", dim: int | None = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, name, dim)


def remove_old(module: nn.Module, name: str = "weight") -> None:
    torch.nn.utils.remove_weight_norm(module, name)


def wrap_new(module: nn.Module, name: str = "weight", dim: int | None = 0) -> None:
    parametrizations.weight_norm(module, name, dim)


def remove_new(module: nn.Module, name: str = "weight") -> None:
    parametrize.remove_parametrizations(module, name)


@dataclass(frozen=True)
class Flavour:
    """One of torch's two weight norms."""

    layout: str
    wrap: Callable[..., None]
    remove: Callable[..., None]
    g: str
    v: str


FLAVOURS = {
    "old": Flavour("weight_norm", wrap_old, remove_old, "weight_g", "weight_v"),
    "new": Flavour(
        "parametrizations", wrap_new, remove_new, "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ),
}  # fmt: skip
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(40, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv transpose 1d": lambda: nn.ConvTranspose1d(6, 4, 7),
    "conv transpose 1d, square": lambda: nn.ConvTranspose1d(6, 6, 7),
}
DIMS = {
    "linear": 0,
    "conv1d": 0,
    "conv2d": 0,
    "conv transpose 1d": 0,
    "conv transpose 1d, dim 1": 1,
    "conv1d, dim 2": 2,
    "conv1d, dim None": None,
    "linear, dim None": None,
    "linear, dim 1": 1,
}
State = Mapping[str, Tensor]


class Net(nn.Module):
    """One layer under a name, as it stands in a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def a_net(make: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(make())


def trained(make: Callable[[], nn.Module], flavour: Flavour, dim: int | None) -> Net:
    """Weight-normalized, and trained: ‖v‖ is not g."""
    net = a_net(make)
    flavour.wrap(net.layer, dim=dim)
    with torch.no_grad():
        for key, value in net.layer.state_dict(keep_vars=True).items():
            value.mul_(torch.rand(value.shape, generator=torch.Generator().manual_seed(len(key))) + 0.5)
    return net


def ulps(found: Tensor, expected: Tensor) -> float:
    """Largest distance in units of the last place of ``expected``."""
    spacing = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
    return float(((found.double() - expected.double()).abs() / spacing.double()).max())


def removed_in_float64(
    make: Callable[[], nn.Module], flavour: Flavour, dim: int | None, state: State
) -> Tensor:
    """The weight torch's own removal leaves of a state_dict, computed in float64 and rounded once."""
    net = a_net(make)
    flavour.wrap(net.layer, dim=dim)
    net.load_state_dict(state, strict=True)
    net.double()
    flavour.remove(net.layer)
    return net.state_dict()["layer.weight"].float()
