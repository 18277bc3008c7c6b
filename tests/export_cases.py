"""Networks in which the exporter does everything it does to weights, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from reparam.export import Exported, export_onnx_model
from reparam.graph import InputSpec, parse_spec
from reparam.onnxfile.reading import read_initializers


class Convolutions(nn.Module):
    """Batch norms behind every kind of layer the exporter folds them into, and one it cannot fold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3)
        self.act = nn.PReLU(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False)
        self.up_bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.fc_bn = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(self.first(x).relu())))
        y = self.up_bn(self.up(self.bare(self.depthwise(y)))).relu().mean((2, 3))
        return self.head(self.fc_bn(self.fc(y)).relu())


class Sequences(nn.Module):
    """Weights that the exporter transposes, joins and reorders; a tied head, and a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.lstm = nn.LSTM(8, 5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        y = self.gru(self.lstm(self.block(self.embed(tokens) + offset))[0])[0]
        logits = self.head(y) * self.temperature
        return logits, logits.argmax(-1)


@dataclass(frozen=True)
class Network:
    """How to build one, and what it takes."""

    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]

    @property
    def specs(self) -> list[InputSpec]:
        return [parse_spec(text) for text in self.inputs]


NETWORKS = {
    "convolutions": Network(Convolutions, ("x=float32[N,3,6,6]",)),
    "sequences": Network(Sequences, ("tokens=int64[N,4]", "offset=float32[N,1,8]")),
}


def random_model(name: str, seed: int) -> nn.Module:
    """A network of the table in evaluation mode, every tensor drawn at random: nothing is 0 or 1."""
    model = NETWORKS[name].build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator) * 0.4
                x.copy_(noise.abs() + 0.3 if key.endswith("running_var") else noise)
    return model.eval()


class Exports:
    """Exports of the networks, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, int, str | None], tuple[Path, Exported]] = {}

    def __call__(self, name: str, seed: int, dtype: str | None = None) -> tuple[Path, Exported]:
        if (name, seed, dtype) not in self._made:
            path = self._folder / f"{name}-{seed}-{dtype}.onnx"
            done = export_onnx_model(random_model(name, seed), NETWORKS[name].specs, path, dtype=dtype)
            self._made[name, seed, dtype] = path, done
        return self._made[name, seed, dtype]


def values_of(path: Path) -> dict[str, Tensor]:
    """All initializers of a file."""
    return {name: held.tensor() for name, held in read_initializers(path).items()}


def blanked(path: Path) -> bytes:
    """The graph without the values of its floating initializers, and without places of external ones."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            tensor.ClearField("raw_data")
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = ""
    return model.graph.SerializeToString(deterministic=True)


def without_metadata(path: Path, out: Path, rename: bool = False) -> Path:
    """A file as others write it: no word of its weights, and names of its own."""
    model = onnx.load(path)
    del model.metadata_props[:]
    if rename:
        names = {tensor.name: f"onnx::T_{i}" for i, tensor in enumerate(model.graph.initializer)}
        for tensor in model.graph.initializer:
            tensor.name = names[tensor.name]
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, out)
    return out
