"""The examples run, shortened; what they print is what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "reached", "into", "exact"),
    [
        ("hand_written_loop", 12, 20.0, "SmallCNN", 1e-4),
        ("hf_trainer", 40, 90.0, "BertForSequenceClassification", 1e-5),
    ],
)
def test_an_example_trains_and_folds(name: str, steps: int, reached: float, into: str, exact: float) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    before, after = (
        float(value) for value in re.findall(r"^accuracy.* ([\d.]+)%$", done.stdout, re.MULTILINE)
    )
    assert after >= reached > before
    (folded,) = re.findall(
        rf"^folded into {into}: largest difference of an output ([\d.e+-]+)$", done.stdout, re.MULTILINE
    )
    assert float(folded) <= exact
