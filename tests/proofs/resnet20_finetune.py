"""Proof by running: a trained ResNet-20 goes from batch norm to GmP+MN, is fine-tuned, exported and verified.

Too long for the test-suite; its result is committed beside it. What a user would type:

    python tests/proofs/resnet20_finetune.py --shared /a/folder/of/shared/data --json tests/proofs/resnet20_finetune.json

The images are a JPEG copy of CIFAR-10, which costs accuracy before and after alike; a part of them is what two cores can
train on in minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reparam.bench.machine import describe
from reparam.training.data import load_data

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "data/checkpoints/resnet_cifar10/resnet20-12fca82f.th"
ARCH = str(ROOT / "examples" / "models" / "cifar_resnet.py") + ":resnet20"
#: of ImageNet: the checkpoint's authors normalized CIFAR-10 by them
STATISTICS = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
RECIPE = ["--lr", "0.001", "--flip", "--crop", "4", *STATISTICS]


def subset(shared: Path, out: Path, train: int, test: int) -> None:
    """The first images of both parts, decoded, as one archive; and the normalized ones that calibrate."""
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        data = load_data(
            str(shared / "data" / "cifar10" / f"{part}.parquet"), normalize=False, validation=0.001
        )
        images, labels = data.train.take(range(count))
        arrays |= {f"x_{part}": images.numpy(), f"y_{part}": labels.numpy()}
    np.savez(out / "cifar.npz", **arrays)
    mean, deviation = (
        torch.tensor([float(v) for v in STATISTICS[i].split(",")]).view(3, 1, 1) for i in (1, 3)
    )
    pixels = torch.from_numpy(arrays["x_train"][:512]).float() / 255
    np.savez(out / "calibration.npz", x=((pixels - mean) / deviation).numpy())


def run(*command: str | Path) -> tuple[dict[str, Any], float]:
    """What a command of reparam says, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "reparam", *map(str, command), "--json"], stdout=subprocess.PIPE, check=True
    )
    value: dict[str, Any] = json.loads(done.stdout)
    return value, round(time.perf_counter() - began, 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True, help="folder of the shared data")
    parser.add_argument("--json", type=Path, required=True, help="write the result here")
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--test", type=int, default=2000, help="validation images")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subset(options.shared, work, options.train, options.test)
        arch, gmp, onnx = ["--arch", ARCH], work / "resnet20.gmp.safetensors", work / "resnet20.onnx"
        converted, converting = run(
            "convert", options.shared / CHECKPOINT, *arch, "--to", "gmp", "--fold-bn", "--mean-norm",
            "--calibrate", work / "calibration.npz", "-o", gmp,
        )  # fmt: skip
        trained, training = run(
            "finetune", gmp, *arch, "--data", work / "cifar.npz", "--epochs", str(options.epochs), *RECIPE,
            "-o", work / "run",
        )  # fmt: skip
        exported, exporting = run(
            "export", work / "run" / "best.safetensors", *arch, "--input", "N,3,32,32", "--onnx", onnx
        )
        refitted, _ = run("export", work / "run", "--onnx", work / "again.onnx")
    value = {
        "machine": describe(),
        "settings": {
            "train": options.train,
            "test": options.test,
            "epochs": options.epochs,
            "recipe": RECIPE[:5],
        },
        "seconds": {"convert": converting, "finetune": training, "export and verify": exporting},
        "roundtrip": converted["roundtrip"],
        "before": trained["before"],
        "best": trained["best"],
        "last": trained["last"],
        "samples_per_s": round(trained["samples_per_s"], 1),
        "waiting_for_data": round(trained["waiting"], 4),
        "exported": exported["checks"],
        "exported_from_the_run": refitted["checks"],
        "passed": bool(exported["passed"] and refitted["passed"]),
    }
    options.json.write_text(json.dumps(value, indent=2) + "\n")
    print("passed" if value["passed"] else "FAILED")
    return 0 if value["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
