"""Proof by running: a trained ResNet-20 goes into every parameterization and back, and predicts what it did.

Too long for the test-suite, which runs the same on fewer images; its result is committed beside it.

    python tests/proofs/resnet20_surgery.py --shared /a/folder/of/shared/data --json tests/proofs/resnet20_surgery.json

All in float32: batch norm is folded, layers converted and, where they normalize means, calibrated; then all is folded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.models.cifar_resnet import resnet20
from reparam import Outcome, convert, fold, load_state_dict
from reparam.bench.machine import describe

CHECKPOINT = "data/checkpoints/resnet_cifar10/resnet20-12fca82f.th"
IMAGES = "data/cifar10/train_first4000_lossless.npz"
#: of ImageNet: the checkpoint's authors normalized CIFAR-10 by them
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION = 512
FORMS: dict[str, dict[str, Any]] = {
    "SP": {"to": "sp"},
    "WN+MBN": {"to": "wn", "mean_norm": True},
    "GmP": {"to": "gmp"},
    "GmP+MN": {"to": "gmp", "mean_norm": True},
    "unit norm": {"to": "unit"},
}


def trained(shared: Path) -> nn.Module:
    """The network with the checkpoint's weights, in evaluation mode."""
    tensors, _ = load_state_dict(shared / CHECKPOINT)
    model = resnet20()
    model.load_state_dict({key.removeprefix("module."): value for key, value in tensors.items()}, strict=True)
    return model.eval()


def images(shared: Path) -> tuple[Tensor, Tensor]:
    """The 4,000 lossless images, (4000, 3, 32, 32) float32 normalized, and their labels."""
    with np.load(shared / IMAGES) as data:
        pixels, labels = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (scaled - mean) / deviation, labels


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in pixels.split(250)])


def surgery(model: nn.Module, form: str, data: Tensor) -> tuple[nn.Module, nn.Module, list[Outcome]]:
    """The model converted with batch norm folded, then folded; and what was done on the way in."""
    options, report = FORMS[form], list[Outcome]()
    if "mean_norm" in options:
        options = options | {"calibrate": data.split(128)}
    converted = convert(model, fold_bn=True, report=report, **options)
    return converted, fold(converted), report


def row_error(found: nn.Module, expected: nn.Module) -> float:
    """Largest ‖Δw‖/‖w‖ of any unit."""
    pairs = zip(found.state_dict().items(), expected.state_dict().values(), strict=True)
    rows = [(a.double().flatten(1), b.double().flatten(1)) for (_, a), b in pairs if a.dim() > 1]
    return max(float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) for a, b in rows)


def compared(found: Tensor, expected: Tensor, labels: Tensor) -> dict[str, Any]:
    return {
        "accuracy": round(float((found.argmax(1) == labels).double().mean()), 6),
        "predictions_changed": int((found.argmax(1) != expected.argmax(1)).sum()),
        "max_logit_difference": float((found - expected).abs().max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True, help="folder of the shared data")
    parser.add_argument("--json", type=Path, required=True, help="write the result here")
    options = parser.parse_args()
    model, (pixels, labels) = trained(options.shared), images(options.shared)
    expected = logits(model, pixels)
    # What 32 bits leave open anyway: the trained network's own error, against itself in float64.
    own = float((expected - logits(trained(options.shared).double(), pixels.double())).abs().max())
    steps, plain = [], None
    for form in FORMS:
        began = time.perf_counter()
        converted, folded, report = surgery(model, form, pixels[:CALIBRATION])
        seconds = time.perf_counter() - began
        plain = plain or folded
        steps.append(
            {
                "form": form,
                "layers_converted": sum(o.applied for o in report if o.rule in ("swap", "unit norm")),
                "scales_placed": sum(o.applied for o in report if o.rule == "place scale"),
                "means_calibrated": sum(o.applied for o in report if o.rule == "calibrate"),
                "converted": compared(logits(converted, pixels), expected, labels),
                "folded": compared(logits(folded, pixels), expected, labels),
                # Unit norm moves scales into other layers: its rows are others.
                "max_row_error": None if form == "unit norm" else row_error(folded, plain),
                "surgery_seconds": round(seconds, 2),
            }
        )
        print(steps[-1], file=sys.stderr)
    results = [step[when] for step in steps for when in ("converted", "folded")]
    value = {
        "machine": describe(),
        "settings": {"images": len(pixels), "calibration_images": CALIBRATION, "dtype": "float32"},
        "original": {
            "accuracy": compared(expected, expected, labels)["accuracy"],
            "largest_logit": float(expected.abs().max()),
            "own_float32_error": own,
        },
        "steps": steps,
        "passed": all(result["predictions_changed"] == 0 for result in results),
    }
    options.json.write_text(json.dumps(value, indent=2) + "\n")
    print("passed" if value["passed"] else "FAILED")
    return 0 if value["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
