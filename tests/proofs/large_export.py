"""Proof by running: a network of more than 2 GB exports with its values beside the ONNX file, and survives kills.

Too long for the test-suite; its result is committed beside it.

    python tests/proofs/large_export.py --dir /a/disk/with/15/GB --json tests/proofs/large_export.json
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from reparam.bench.machine import describe
from reparam.checkpoint.staging import staged
from reparam.export import export_onnx_model
from reparam.graph import parse_spec

KILLS = 4
SPECS = [parse_spec("x=float32[N,4096]")]


def network(gigabytes: float) -> nn.Module:
    """Linear layers of 4096 units and ReLUs, float32."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(round(gigabytes * 1e9 / (4096 * 4097 * 4))):
        layers += [nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def export(target: Path, gigabytes: float) -> dict[str, Any]:
    """One export in this process: its seconds and the process's peak memory."""
    model = network(gigabytes)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    with staged(target) as temporary:
        done = export_onnx_model(model, SPECS, temporary, target=target)
    seconds = time.perf_counter() - began
    assert done.data is not None
    return {
        "seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "model_loaded_mb": round(loaded * 1024 / 1e6),
        "weights_mapped": len(done.found.weights.sources),
        "onnx_bytes": target.stat().st_size,
        "data_bytes": done.data.stat().st_size,
    }


def computes_the_same(target: Path, gigabytes: float) -> float:
    """The largest difference to the model in float32, in units of the output's largest value, by ONNX Runtime."""
    import onnxruntime

    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(gigabytes)(x).numpy()
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})[0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def worker(target: Path, gigabytes: float, what: str) -> list[str]:
    return [sys.executable, __file__, "--worker", what, "--target", str(target), "--size", str(gigabytes)]


def kills(work: Path, gigabytes: float, exported: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """SIGKILL while the graph is captured, and while the values are written."""
    moments, target = random.Random(seed), work / "killed.onnx"
    rows = []
    for kill in range(KILLS):
        process = subprocess.Popen(worker(target, gigabytes, "export"), stdout=subprocess.DEVNULL)
        share = moments.uniform(0.05, 0.95)
        if kill % 2:
            while process.poll() is None and _written(work) < share * exported["data_bytes"]:
                time.sleep(0.01)
        else:
            time.sleep(share * 0.5 * exported["seconds"])
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        left = sorted(p.name.rpartition(".")[2] for p in work.iterdir() if "killed" in p.name)
        moment = f"{share:.0%} of the values written" if kill % 2 else "while capturing"
        rows.append({"moment": moment, "status": status, "final_exists": target.exists(), "left": left})
        print(rows[-1], file=sys.stderr)
    return rows


def _written(work: Path) -> int:
    """Bytes of values so far."""
    return sum(p.stat().st_size for p in work.glob(".killed.onnx.data.*.partial"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=2.3, help="GB of weights")
    parser.add_argument("--dir", type=Path, default=None, help="work here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--worker", choices=["export", "compare"], help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "export":
        print(json.dumps(export(options.target, options.size)))
        return 0
    if options.worker == "compare":
        print(json.dumps(computes_the_same(options.target, options.size)))
        return 0
    work = Path(tempfile.mkdtemp(prefix="reparam-proof-", dir=options.dir))
    try:
        ran = subprocess.run(
            worker(work / "m.onnx", options.size, "export"), check=True, capture_output=True, text=True
        )
        exported = json.loads(ran.stdout)
        print(exported, file=sys.stderr)
        compare = worker(work / "m.onnx", options.size, "compare")
        files = sorted(p.suffix for p in work.iterdir())
        apart = json.loads(subprocess.run(compare, check=True, capture_output=True, text=True).stdout)
        rows = kills(work, options.size, exported, options.seed)
        subprocess.run(
            worker(work / "killed.onnx", options.size, "export"), check=True, stdout=subprocess.DEVNULL
        )
        partial = [p.name for p in work.iterdir() if p.name.endswith(".partial")]
        value: dict[str, Any] = {
            "machine": describe(),
            "settings": {"gigabytes": options.size, "seed": options.seed},
            "export": exported,
            "files": files,
            "largest_relative_difference": apart,
            "kills": rows,
            "temporaries_after_the_next_run": len(partial),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    killed = all(row["status"] == -signal.SIGKILL and not row["final_exists"] for row in rows)
    value["passed"] = apart < 1e-5 and files == [".data", ".onnx"] and killed and not partial
    if options.json:
        options.json.write_text(json.dumps(value, indent=2) + "\n")
    print("passed" if value["passed"] else "FAILED")
    return 0 if value["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
