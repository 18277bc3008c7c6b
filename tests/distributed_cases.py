"""What two ranks and one process are to compute alike: three steps by hand, and runs of the whole loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training_cases import geometric, labelled, plain, recipe, trained, values

from reparam import convert
from reparam.layers import layer_class
from reparam.training.distributed import World
from reparam.training.events import EvaluationEvent, Event, StepEvent


class Recurrent(nn.Module):
    """(N, 3, 6, 6) images as six steps of 18 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(18, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x.reshape(len(x), 6, 18))[0][:, -1])
        return out


def network(form: str | None = None, mean: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 5)).double()
    if form is not None:
        model = convert(model, to=form)
        for name in ("0", "2") if mean is not None else ():
            model.get_submodule(name).normalize_mean(mean)
    return model


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    model = Recurrent().double()
    model.rnn = layer_class("gmp", nn.RNN).from_plain(model.rnn).normalize_mean("mn")
    return model


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layer = layer_class("gmp", nn.Linear).from_plain(nn.Linear(108, 5)).normalize_mean("mn")
    return nn.Sequential(nn.Flatten(), layer).double()


def centered() -> nn.Module:
    model = convert(plain(), to="wn")
    model.get_submodule("0").normalize_mean("mbn")
    return model


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "gmp+mn": lambda: network("gmp", "mn"),
    "gmp+mbn": lambda: network("gmp", "mbn"),
    "wn+mn": lambda: network("wn", "mn"),
    "wn+mbn": lambda: network("wn", "mbn"),
    "recurrent": recurrent,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
#: of 8 samples, what each rank has
SHARES = {"equal": (4, 4), "unequal": (3, 5), "one has none": (0, 8)}
CASES = [
    *[(model, optimizer, "equal") for model in MODELS for optimizer in OPTIMIZERS],
    *[(model, "sgd", share) for model in ("gmp+mn", "wn+mbn") for share in ("unequal", "one has none")],
]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randint(5, (8,), generator=generator)


def steps(
    model: nn.Module,
    network: Callable[[Tensor], Tensor],
    optimizer: str,
    mine: slice = slice(None),
    size: int = 1,
) -> dict[str, Tensor]:
    """Three steps by hand, with the scaling of the loss that ``World.wrap`` asks for."""
    taken = OPTIMIZERS[optimizer](model.parameters())
    for step in range(3):
        x, y = batch(step)
        taken.zero_grad()
        loss = F.cross_entropy(network(x[mine]), y[mine], reduction="sum") * size / len(x)
        loss.backward()
        taken.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def checkpointed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


#: how a run of the whole loop is made: its network, and its recipe
RUNS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "gmp+mn, sgd": (
        geometric,
        {"clip": 0.5, "ema": 0.8, "schedule": "cosine", "warmup": 3, "weight_decay": 0.01, "lr": 0.3},
    ),
    "wn+mbn, adam": (centered, {"optimizer": "adam", "lr": 0.01}),
    "batch norm": (normed, {"lr": 0.3}),
    "plain, in parts": (plain, {"accumulate": 2, "lr": 0.2, "schedule": "plateau", "patience": 1}),
}


def run(name: str, folder: Path, world: World | None = None, **options: Any) -> dict[str, Any]:
    """A run of three epochs of five steps; the last of three validation batches is of one sample."""
    make, fields = RUNS[name]
    model, losses, metrics = make(), [], []

    def tell(event: Event) -> None:
        if isinstance(event, StepEvent):
            losses.append(event.loss)
        elif isinstance(event, EvaluationEvent):
            metrics.append([event.result.loss, event.result.value])

    chosen = recipe(dtype="float64", **fields)
    result = trained(model, labelled(), chosen, folder, world=world, tell=tell, **options)
    return {
        "weights": dict(values(model)),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "metrics": torch.tensor(metrics, dtype=torch.float64),
        "last": torch.tensor([result.last.loss, result.last.value], dtype=torch.float64),
        "interrupted": result.interrupted,
    }
