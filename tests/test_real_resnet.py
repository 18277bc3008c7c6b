"""A trained ResNet-20 in every parameterization and back, on some of its images; all 4,000: proofs/resnet20_surgery.py.

The checkpoint and the images are in shared/data; without them these tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from proofs.resnet20_surgery import CHECKPOINT, FORMS, IMAGES, images, logits, row_error, surgery, trained
from scale_oracle import applied
from torch import Tensor, nn

from reparam.layers import Reparameterized

TESTED = 200
#: float32, of logits up to 43; the network's own float32 error over all images is 1.8e-5
LOGITS = 1e-4
#: of a unit's weights in float32, as for the map alone
ROW = 2e-7
PROOF = Path(__file__).parent / "proofs" / "resnet20_surgery.json"


@pytest.fixture(scope="module")
def network(shared: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained network, its images and their labels: the first are those that are predicted here."""
    if not ((shared / CHECKPOINT).is_file() and (shared / IMAGES).is_file()):
        pytest.skip("no trained ResNet-20")
    return trained(shared), *images(shared)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_stay(form: str, network: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = network
    pictures = pixels[:TESTED]
    expected = logits(model, pictures)
    assert int((expected.argmax(1) == labels[:TESTED]).sum()) >= TESTED - 2
    converted, folded, report = surgery(model, form, pixels[-256:])
    for found in (logits(converted, pictures), logits(folded, pictures)):
        assert torch.equal(found.argmax(1), expected.argmax(1))
        assert float((found - expected).abs().max()) <= LOGITS
    assert len(applied([o for o in report if o.rule == "fold batch norm"])) == 19
    layers = [m for m in converted.modules() if isinstance(m, Reparameterized)]
    assert len(layers) == {"SP": 0, "unit norm": 9}.get(form, 19)
    if "MN" in form or "MBN" in form:
        means = [buffer for m in layers for buffer in m.buffers(recurse=False)]
        assert len(means) == 19
        assert all(float(mean.abs().max()) > 1e-3 for mean in means)
    if form != "unit norm":
        plain = surgery(model, "SP", pixels[:1])[1]
        assert row_error(folded, plain) <= ROW


def test_the_committed_proof_passed() -> None:
    """And it is a proof of the steps the code takes today."""
    proof: dict[str, Any] = json.loads(PROOF.read_text())
    assert proof["passed"] is True
    assert proof["settings"]["images"] == 4000
    assert proof["original"]["accuracy"] == 0.998
    assert [step["form"] for step in proof["steps"]] == list(FORMS)
    for step in proof["steps"]:
        for when in ("converted", "folded"):
            assert step[when]["predictions_changed"] == 0
            assert step[when]["max_logit_difference"] <= LOGITS
        assert step["max_row_error"] is None or step["max_row_error"] <= ROW
    assert "/" not in str(proof["machine"])
