"""Small data and networks for the tests of training, a run of them in a folder, and what it leaves there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support import gaussian
from torch import Tensor, nn

from reparam.graph import convert
from reparam.layers import Reparameterized
from reparam.training import Recipe, RunFolder, State, TrainingResult, load_recipe, train
from reparam.training.data.types import Data

FEATURES, CLASSES = 6, 3
#: of samples for training and validation: three steps an epoch, two batches an evaluation
SIZES = (13, 5)
#: float64, a few tens of operations per weight and step
SAME = 1e-12

#: networks and a dataset, as a user's file has them
NET = """
import torch
from torch import nn

def net(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(width * 36, 10))

def mlp():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

class Line(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        x = torch.tensor([i / 20 - 1, 1.0])
        return x, x[:1] * 3

def line():
    return Line()
"""


class Held:
    """Samples held in tensors."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[list(indices)], self.targets[list(indices)]

    def place(self, index: int) -> str:
        return f"sample {index}"


def labelled(train: int = 22, validation: int = 9, seed: int = 0) -> Data:
    """Points of six numbers in three classes, two inputs decide."""
    points = gaussian(train + validation, FEATURES, seed=seed)
    labels = (points[:, 0] > 0).long() + (points[:, 1] > 0).long()
    names = tuple("abc")
    return _split(points, labels, train, "classify", names, CLASSES)


def measured(train: int = 22, validation: int = 9, width: int = 2) -> Data:
    """Points of six numbers, each with two values to learn."""
    points = gaussian(train + validation, FEATURES)
    values = points[:, :width] * 2 + 0.1 * gaussian(train + validation, width, seed=1)
    return _split(points, values, train, "regress", (), width)


def pictures(train: int = 22, validation: int = 9) -> Data:
    """Images of two by 6 by 6 pixels in three classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (train + validation, 2, 6, 6), generator=generator).to(torch.uint8)
    labels = torch.arange(train + validation) % CLASSES
    return _split(images, labels, train, "classify", tuple("abc"), CLASSES)


def _split(
    inputs: Tensor, targets: Tensor, train: int, task: str, classes: tuple[str, ...], width: int
) -> Data:
    parts = (Held(inputs[:train], targets[:train]), Held(inputs[train:], targets[train:]))
    return Data(*parts, task, classes, width, tuple(inputs.shape[1:]), (), (), ())


def plain(outputs: int = CLASSES, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Two linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, outputs))


def geometric(outputs: int = CLASSES, dropout: float = 0.0) -> nn.Module:
    """The same in GmP, its means normalized."""
    model = convert(plain(outputs, dropout), to="gmp")
    for module in model.modules():
        if isinstance(module, Reparameterized):
            module.normalize_mean()
    return model


def convolutional() -> nn.Module:
    """A batch norm, dropout, GmP with normalized means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )
    model = convert(model, to="gmp")
    model.get_submodule("3").normalize_mean()  # type: ignore[operator]
    return model


def recipe(**fields: object) -> Recipe:
    """A short one: three epochs of five steps on ``labelled()``."""
    return load_recipe(None, {"epochs": 3, "batch_size": 4, "lr": 0.1, "device": "cpu", **fields})


def trained(
    model: nn.Module, data: Data, chosen: Recipe, folder: Path, *, resumed: bool = False, **options: Any
) -> TrainingResult:
    """A run in ``folder``, new or resumed."""
    run = RunFolder(folder)
    if not resumed:
        run.create()
    return train(model, data, chosen, run, resume=State.load(run.state) if resumed else None, **options)


def values(model: nn.Module) -> Mapping[str, Tensor]:
    """All of a model's tensors, copied."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


class Stopper:
    """Asks to stop from the n-th time it is asked on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def written(folder: Path) -> dict[str, object]:
    """What a run leaves, but for the pace it went at and the state's packing."""
    run = RunFolder(folder)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        for pace in ("samples_per_s", "waiting"):
            line.pop(pace, None)
    files = {file.name: file.read_bytes() for file in (run.best, run.last, *run.earlier(), run.table)}
    state = {
        name: value for name, value in vars(State.load(run.state)).items() if name not in ("file", "metrics")
    }
    return {"lines": lines, **files, "state": _flat(state)}


def _flat(value: object) -> object:
    """Tensors as comparable values."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: _flat(one) for key, one in value.items()}
    return [_flat(one) for one in value] if isinstance(value, (list, tuple)) else value
