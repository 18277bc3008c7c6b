"""Proof by running: every architecture of examples/models in every form exports to the plain network's own graph.

    python tests/proofs/export_matrix.py [NAME ...]        writes export_matrix.json beside it; only with all of them

Each is converted, perturbed as training would, folded, exported and verified; then its file is held against torch's own
export of the plain network with the folded values: operators in their order, initializers by name and value. What may be
left is one Mul for every layer whose negative scale meets a residual addition, or another consumer that is not linear.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch_exports  # noqa: E402
from export_cases import Network  # noqa: E402
from torch_exports import IMAGE, TorchExports, trained  # noqa: E402

from examples.models.resnet import resnet18, resnet34  # noqa: E402
from reparam.bench.machine import describe  # noqa: E402
from reparam.export import export_onnx_model  # noqa: E402
from reparam.graph import convert, fold  # noqa: E402
from reparam.onnxfile import transforms  # noqa: E402
from reparam.onnxfile.reading import read_initializers  # noqa: E402
from reparam.onnxfile.weight_map import WeightMap  # noqa: E402
from reparam.verification import verify_onnx  # noqa: E402
from reparam.verification.report import PROOFS  # noqa: E402
from reparam.verification.weights import same_bits  # noqa: E402

JSON = Path(__file__).with_suffix(".json")
EXAMPLES = {
    **torch_exports.EXAMPLES,
    "resnet18": Network(partial(resnet18, classes=10, stem="cifar"), IMAGE),
    "resnet34": Network(partial(resnet34, classes=10, stem="cifar", batch_norm=False), IMAGE),
}
NEGATIVE = "GmP, r < 0"
FORMS: dict[str, dict[str, Any]] = {
    "SP": {},
    "WN+MBN": {"to": "wn", "mean_norm": True},
    "GmP": {"to": "gmp"},
    "GmP+MN": {"to": "gmp", "mean_norm": True},
    NEGATIVE: {"to": "gmp"},
}


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


def examined(name: str, form: str, plain: TorchExports, folder: Path) -> dict[str, Any]:
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
        plain = TorchExports(EXAMPLES, Path(folder))
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
