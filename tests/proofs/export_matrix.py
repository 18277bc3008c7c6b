"""Proof by running: every architecture of examples/models in every form exports to the plain network's own graph.

    python tests/proofs/export_matrix.py [NAME ...]        writes export_matrix.json beside it; only with all of them

Each is converted, perturbed as training would, folded, exported and verified; then its file is held against torch's own
export of the plain network with the folded values: operators in their order, initializers by name and value. What may be
left is one Mul for every layer whose negative scale meets a residual addition, or another consumer that is not linear.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from examples.models.cifar_resnet import resnet20  # noqa: E402
from examples.models.conv_vae import conv_vae  # noqa: E402
from examples.models.convpool_cnn_c import convpool_cnn_c  # noqa: E402
from examples.models.dqn import dqn  # noqa: E402
from examples.models.draw import draw  # noqa: E402
from examples.models.mini_vgg import mini_vgg  # noqa: E402
from examples.models.mlp import mlp  # noqa: E402
from examples.models.resnet import resnet18, resnet34  # noqa: E402
from examples.models.vgg6 import vgg6  # noqa: E402
from reparam.bench.machine import describe  # noqa: E402
from reparam.export import export_onnx_model  # noqa: E402
from reparam.graph import InputSpec, convert, fold, parse_spec  # noqa: E402
from reparam.onnxfile import transforms  # noqa: E402
from reparam.onnxfile.mapping import find_map  # noqa: E402
from reparam.onnxfile.reading import read_initializers  # noqa: E402
from reparam.onnxfile.weight_map import WeightMap  # noqa: E402
from reparam.verification import verify_onnx  # noqa: E402
from reparam.verification.report import PROOFS  # noqa: E402
from reparam.verification.weights import same_bits  # noqa: E402

JSON = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Example:
    """One architecture, and what it takes."""

    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]

    @property
    def specs(self) -> list[InputSpec]:
        return [parse_spec(text) for text in self.inputs]


IMAGE = ("x=float32[N,3,32,32]",)
EXAMPLES = {
    "mlp": Example(mlp, ("x=float32[N,13]",)),
    "vgg6": Example(partial(vgg6, classes=10, batch_norm=True), IMAGE),
    "resnet18": Example(partial(resnet18, classes=10, stem="cifar"), IMAGE),
    "resnet34": Example(partial(resnet34, classes=10, stem="cifar", batch_norm=False), IMAGE),
    "resnet20": Example(resnet20, IMAGE),
    "convpool_cnn_c": Example(convpool_cnn_c, IMAGE),
    "mini_vgg": Example(mini_vgg, IMAGE),
    "conv_vae": Example(conv_vae, ("x=float32[N,1,28,28]", "noise=float32[N,32]")),
    "dqn": Example(dqn, ("x=float32[N,4,84,84]",)),
    "draw": Example(partial(draw, steps=1), ("x=float32[N,1,28,28]", "noise=float32[N,1,100]")),
}
NEGATIVE = "GmP, r < 0"
FORMS: dict[str, dict[str, Any]] = {
    "SP": {},
    "WN+MBN": {"to": "wn", "mean_norm": True},
    "GmP": {"to": "gmp"},
    "GmP+MN": {"to": "gmp", "mean_norm": True},
    NEGATIVE: {"to": "gmp"},
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


def reparameterized(name: str, form: str) -> nn.Module:
    """The architecture in the form, perturbed; the first unit of every layer of :data:`NEGATIVE` has a negative scale."""
    torch.manual_seed(0)
    model = trained(EXAMPLES[name].build())
    if form != "SP":
        model = trained(convert(model, **FORMS[form]))
    if form == NEGATIVE:
        with torch.no_grad():
            for key, x in model.named_parameters():
                if key.rpartition(".")[2] == "r":
                    x[0] = -x[0].abs()
    return model


class Plain:
    """Torch's own exports of the plain networks, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, tuple[str, ...]], tuple[Path, WeightMap]] = {}

    def __call__(self, name: str, gained: tuple[str, ...]) -> tuple[Path, WeightMap]:
        """The file, whose layers have the biases ``gained`` too, and which weight stands where in it."""
        if (name, gained) not in self._made:
            self._made[name, gained] = self._export(name, gained, self._folder / f"{len(self._made)}.onnx")
        return self._made[name, gained]

    def _export(self, name: str, gained: tuple[str, ...], path: Path) -> tuple[Path, WeightMap]:
        plain, specs = EXAMPLES[name].build().eval(), EXAMPLES[name].specs
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
        eps = {n: m.eps for n, m in plain.named_modules() if hasattr(m, "eps")}
        found = find_map(read_initializers(path), plain.state_dict(), eps)
        assert found.ambiguous == {}
        return path, found.weights


def examined(name: str, form: str, plain: Plain, folder: Path) -> dict[str, Any]:
    """Export, verify and compare; what was found.

    Returns:
        ``proofs``: whether each of the three held; ``same_graph``: whether operators, names and values are torch's own
        but for ``extra_mul`` multiplications by signs; the largest error over the original's own; sizes.
    """
    reference = reparameterized(name, form)
    folded, path = fold(reference), folder / "ours.onnx"
    done = export_onnx_model(folded, EXAMPLES[name].specs, path)
    report = verify_onnx(reference, folded, path, EXAMPLES[name].specs, done.found.weights)
    if not report.passed:
        print("\n".join(report.lines()), file=sys.stderr)
    state = folded.state_dict()
    own = EXAMPLES[name].build().state_dict()
    gained = tuple(sorted(key for key in state.keys() - own.keys() if key.endswith(".bias")))
    ours, values = onnx.load(path), {n: x.tensor() for n, x in read_initializers(path).items()}
    signs = {
        n for n, x in values.items() if x.is_floating_point() and bool((x.abs() == 1).all() and (x < 0).any())
    }
    left = [node for node in ours.graph.node if not (node.op_type == "Mul" and signs & set(node.input))]
    theirs, sources = plain(name, gained)
    errors = [c.max_rel / c.noise_floor for c in report.checks if c.max_rel is not None and c.noise_floor]
    return {
        "proofs": {proof: all(c.passed for c in report.proof(proof)) for proof in PROOFS if report.proof(proof)},
        "same_graph": _same(left, {n: x for n, x in values.items() if n not in signs}, theirs, sources, state),
        "extra_mul": len(ours.graph.node) - len(left),
        "biases_gained": len(gained),
        "nodes": len(ours.graph.node),
        "initializers": len(values),
        "worst_error": round(max(errors, default=0.0), 2),
    }  # fmt: skip


def _same(
    nodes: list[onnx.NodeProto],
    values: dict[str, Tensor],
    theirs: Path,
    sources: WeightMap,
    state: dict[str, Tensor],
) -> bool:
    """Whether nodes and initializers are those of torch's file, were it given the folded values."""
    expected = onnx.load(theirs)
    constants = {n: x.tensor() for n, x in read_initializers(theirs).items()}
    wanted = {
        name: transforms.apply(sources.sources[name], state) if name in sources.sources else constant
        for name, constant in constants.items()
    }
    # Constants have no names but numbers, which go up by one behind every multiplication that is left.
    named = [[name if name in state else "" for name in tensors] for tensors in (values, wanted)]
    return (
        [node.op_type for node in nodes] == [node.op_type for node in expected.graph.node]
        and named[0] == named[1]
        and all(map(same_bits, values.values(), wanted.values()))
    )


def main() -> int:
    """Print the table, write it, and say whether all is as it must be."""
    names = sys.argv[1:] or list(EXAMPLES)
    began, rows = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Plain(Path(folder))
        for name in names:
            for form in FORMS:
                row = rows[f"{name}, {form}"] = examined(name, form, plain, Path(folder))
                print(f"{name + ', ' + form:26}", json.dumps(row), flush=True)
    wrong = [name for name, row in rows.items() if not (all(row["proofs"].values()) and row["same_graph"])]
    value = {"machine": describe(), "seconds": round(time.perf_counter() - began), "rows": rows}
    if len(names) == len(EXAMPLES):
        JSON.write_text(json.dumps(value, indent=1) + "\n")
    print(f"{len(rows)} exports, wrong: {wrong or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
