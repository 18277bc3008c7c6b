"""Networks of examples/models, and torch's own exports of them: what ours are held against."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from export_cases import Network
from torch import nn

from examples.models.cifar_resnet import resnet20
from examples.models.conv_vae import conv_vae
from examples.models.convpool_cnn_c import convpool_cnn_c
from examples.models.dqn import dqn
from examples.models.draw import draw
from examples.models.mini_vgg import mini_vgg
from examples.models.mlp import mlp
from examples.models.vgg6 import vgg6
from reparam.onnxfile.mapping import find_map
from reparam.onnxfile.reading import read_initializers
from reparam.onnxfile.weight_map import WeightMap

IMAGE = ("x=float32[N,3,32,32]",)
#: all architectures but those of resnet.py, of which each user takes others
EXAMPLES = {
    "mlp": Network(mlp, ("x=float32[N,13]",)),
    "vgg6": Network(partial(vgg6, classes=10, batch_norm=True), IMAGE),
    "resnet20": Network(resnet20, IMAGE),
    "convpool_cnn_c": Network(convpool_cnn_c, IMAGE),
    "mini_vgg": Network(mini_vgg, IMAGE),
    "conv_vae": Network(conv_vae, ("x=float32[N,1,28,28]", "noise=float32[N,32]")),
    "dqn": Network(dqn, ("x=float32[N,4,84,84]",)),
    "draw": Network(partial(draw, steps=1), ("x=float32[N,1,28,28]", "noise=float32[N,1,100]")),
}


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """As after training: every parameter moved, statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator) * 0.05
                x.add_(noise.abs() if key.endswith("running_var") else noise)
    return model.eval()


class TorchExports:
    """Torch's own exports of the plain networks, each made once."""

    def __init__(self, networks: Mapping[str, Network], folder: Path) -> None:
        self._networks, self._folder = networks, folder
        self._made: dict[tuple[str, tuple[str, ...]], tuple[Path, WeightMap]] = {}

    def __call__(self, name: str, gained: tuple[str, ...]) -> tuple[Path, WeightMap]:
        """The file, whose layers have the biases ``gained`` too, and which weight stands where in it."""
        if (name, gained) not in self._made:
            self._made[name, gained] = self._export(name, gained, self._folder / f"{len(self._made)}.onnx")
        return self._made[name, gained]

    def _export(self, name: str, gained: tuple[str, ...], path: Path) -> tuple[Path, WeightMap]:
        plain, specs = self._networks[name].build().eval(), self._networks[name].specs
        for key in gained:
            layer = plain.get_submodule(key.removesuffix(".bias"))
            layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]))
        trained(plain, seed=5)
        shapes = [[axis for axis in spec.axes if isinstance(axis, int)] for spec in specs]
        batch = torch.export.Dim("N", min=1)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's own
            program = torch.onnx.export(
                plain,
                tuple(torch.randn(2, *shape) for shape in shapes),
                dynamo=True,
                verbose=False,
                input_names=[spec.name for spec in specs],
                dynamic_shapes=tuple({0: batch} for _ in specs),
            )
        assert program is not None
        program.save(path)
        found = find_map(read_initializers(path), plain.state_dict())
        assert found.ambiguous == {}
        return path, found.weights
