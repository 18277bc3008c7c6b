"""Two tables: which proof catches which fault at which type, and where; and files without a fault, which must pass.

python tests/proofs/fault_catalogue.py        writes fault_catalogue.json beside it
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import FAULTS, NETWORKS, TYPES, Text, Vision, exported, faulty, fill  # noqa: E402

from examples.models import cifar_resnet, dqn, mlp  # noqa: E402
from reparam.graph import InputSpec  # noqa: E402
from reparam.verification.report import PROOFS  # noqa: E402

SEEDS = 5


class Recurrent(nn.Module):
    """A recurrent network of some kind over a sequence."""

    def __init__(self, cls: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.cell = cls(5, 6, batch_first=True, **options)
        self.head = nn.Linear(6 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.head(self.cell(x)[0]), -1)


class Attention(nn.Module):
    """A transformer's layer over token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(ids)))


class Decides(nn.Module):
    """Integers, truth values and top-k beside scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = self.body(x)
        best, where = scores.topk(2)
        return scores, scores.argmax(1), scores > 0, best, where


class Mixed(nn.Module):
    """float32 in its forward pass, and a table that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.table = torch.linspace(-1, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.nn.functional.gelu(self.a(x).float() + self.table))


def _spec(*axes: int | str, name: str = "x", dtype: str = "float32") -> list[InputSpec]:
    return [InputSpec(name, axes, dtype)]


ROW = _spec("N", 6)
SEQUENCE = _spec("N", "T", 5)

#: name -> (model, inputs, type, parameterization)
CLEAN: dict[str, tuple[Callable[[], nn.Module], list[InputSpec], str, str]] = {
    "vision": (Vision, NETWORKS["vision"][1], "fp32", "gmp"),
    "vision, fp16": (Vision, NETWORKS["vision"][1], "fp16", "gmp"),
    "vision, bf16": (Vision, NETWORKS["vision"][1], "bf16", "gmp"),
    "vision, WN": (Vision, NETWORKS["vision"][1], "fp32", "wn"),
    "vision, plain": (Vision, NETWORKS["vision"][1], "fp32", "sp"),
    "text": (Text, NETWORKS["text"][1], "fp32", "gmp"),
    "text, fp16": (Text, NETWORKS["text"][1], "fp16", "gmp"),
    "text, bf16": (Text, NETWORKS["text"][1], "bf16", "gmp"),
    "text, WN": (Text, NETWORKS["text"][1], "fp32", "wn"),
    "text, plain": (Text, NETWORKS["text"][1], "fp32", "sp"),
    "GRU": (lambda: Recurrent(nn.GRU), SEQUENCE, "fp32", "sp"),
    "LSTM, two layers": (lambda: Recurrent(nn.LSTM, num_layers=2), SEQUENCE, "fp32", "gmp"),
    "LSTM, both directions": (lambda: Recurrent(nn.LSTM, bidirectional=True), SEQUENCE, "fp32", "sp"),
    "transformer": (Attention, _spec("N", "T", name="ids", dtype="int64"), "fp32", "sp"),
    "decides": (Decides, ROW, "fp32", "gmp"),
    "decides, fp16": (Decides, ROW, "fp16", "sp"),
    "float32 inside": (Mixed, ROW, "fp32", "gmp"),
    "fixed batch": (Mixed, _spec(4, 6), "fp32", "sp"),
    "any image size": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                       nn.Linear(4, 3), nn.Softmax(1)), _spec("N", 3, "H", "W"), "fp32", "gmp"),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.SiLU()),
                               _spec("N", 3, 6, 7), "fp32", "sp"),
    "MLP": (lambda: mlp.mlp(8, 16, 2), _spec("N", 8), "fp32", "gmp"),
    "DQN": (dqn.dqn, _spec("N", 4, 84, 84), "fp32", "gmp"),
    "ResNet-20": (cifar_resnet.resnet20, _spec("N", 3, 32, 32), "fp32", "gmp"),
}  # fmt: skip


def _caught(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in FAULTS}
    for kind in TYPES:
        bases = {n: exported(b(), s, folder / f"{n}.{kind}.onnx", kind) for n, (b, s) in NETWORKS.items()}
        for name, fault in FAULTS.items():
            if kind not in fault.kinds:
                continue
            report = bases[fault.network].verify(faulty(bases[fault.network], fault, folder / "faulty.onnx"))
            proofs = [p for p in PROOFS if any(not check.passed for check in report.proof(p))]
            found[name][kind] = {"proofs": ", ".join(proofs), "key": report.diverges}
    return found


def _clean(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name, (build, specs, kind, to) in CLEAN.items():
        torch.manual_seed(0)
        model = build().eval()
        fill(model)
        base = exported(model, specs, folder / "clean.onnx", kind, to)
        rows = []
        for seed in range(SEEDS):
            report = base.verify(seed=seed)
            ratios = [
                c.max_rel / c.noise_floor for c in report.checks if c.max_rel is not None and c.noise_floor
            ]
            rows.append({"passed": report.passed, "worst": round(max(ratios, default=0.0), 2)})
            if not report.passed:
                print("\n".join(report.lines()), file=sys.stderr)
        found[name] = rows
        worst = max(row["worst"] for row in rows)
        print(
            f"{name:26} {'passed' if all(r['passed'] for r in rows) else 'FALSE ALARM'} {worst:5.2f}",
            flush=True,
        )
    return found


def main() -> int:
    """Print both tables, write them, and say whether all is as it must be."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        faults = _caught(Path(folder))
        for name, row in faults.items():
            told = {kind: f"{r['proofs'] or 'MISSED'} {r['key'] or ''}" for kind, r in row.items()}
            print(f"{name:34} " + "  ".join(f"{kind} {told.get(kind, '—'):42}" for kind in TYPES))
        print(f"\n{'clean file':26} verdict, largest error over the original's own (10 allowed)")
        clean = _clean(Path(folder))
    value = {"seconds": round(time.perf_counter() - start), "faults": faults, "clean": clean}
    (Path(__file__).parent / "fault_catalogue.json").write_text(json.dumps(value, indent=1) + "\n")
    missed = [name for name, row in faults.items() if not all(found["proofs"] for found in row.values())]
    misplaced = [
        f"{name} at {kind}: {found['key']}"
        for name, row in faults.items()
        for kind, found in row.items()
        if not FAULTS[name].is_named(found["key"])
    ]
    alarms = [name for name, rows in clean.items() if not all(row["passed"] for row in rows)]
    print(
        f"\n{len(faults)} faults, missed: {missed or 'none'}, misplaced: {misplaced or 'none'}; "
        f"{len(clean)} clean × {SEEDS}: {alarms or 'no false alarm'}"
    )
    return 1 if missed or misplaced or alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
