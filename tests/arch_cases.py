"""A small network in a file of its own, its checkpoint, and what a file made of it holds."""

from __future__ import annotations

from pathlib import Path

from graph_cases import noise, randomized
from safetensors.torch import save_file
from torch import Tensor, nn

from reparam.checkpoint import load_state_dict
from reparam.graph import apply_records, load_architecture, load_into

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc1 = nn.Linear(width, 7)
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


def net(width: int = 5):
    return Net(width)
"""
X = noise(3, 3, 6, 6)


def write_arch(folder: Path) -> str:
    """The network's file: what ``--arch`` takes."""
    (folder / "net.py").write_text(NET)
    return f"{folder / 'net.py'}:net"


def write_checkpoint(arch: str, folder: Path) -> Path:
    """Its checkpoint, in a folder of its own."""
    (folder / "in").mkdir()
    save_file(randomized(load_architecture(arch)).state_dict(), folder / "in" / "model.safetensors")
    return folder / "in" / "model.safetensors"


def inputs_file(folder: Path, x: Tensor = X) -> Path:
    save_file({"x": x}, folder / "inputs.safetensors")
    return folder / "inputs.safetensors"


def loaded(file: Path, arch: str) -> nn.Module:
    """What the file holds, put into its network by hand, in float64."""
    tensors, records = load_state_dict(file)
    plain = load_architecture(arch).double()
    found = apply_records(plain, records)
    load_into(found, tensors, str(file))
    return found.eval()
