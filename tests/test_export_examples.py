"""Every architecture of examples/models in every form: the committed matrix of all, and a few of it made anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from proofs.export_matrix import EXAMPLES, FORMS, JSON, NEGATIVE, examined
from torch_exports import TorchExports

MODELS = Path(__file__).parent.parent / "examples" / "models"
#: an allowance of rounding, as in the verification itself
LARGEST = 10.0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TorchExports:
    return TorchExports(EXAMPLES, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("name", "form"), [("mlp", "SP"), ("mlp", "GmP+MN"), ("conv_vae", "WN+MBN"), ("mini_vgg", NEGATIVE)]
)
def test_an_export_is_proven_and_torchs_own(
    name: str, form: str, plain: TorchExports, tmp_path: Path
) -> None:
    row = examined(name, form, plain, tmp_path)
    assert row["proofs"].keys() == {"weights", "algebra", "deployment"}
    assert all(row["proofs"].values())
    assert row["same_graph"]
    assert row["extra_mul"] == 0
    assert 0 < row["worst_error"] <= LARGEST


def test_the_committed_matrix_is_whole_and_passed() -> None:
    """A multiplication is left by negative scales alone, and only where a sum or a reshape takes what they scale."""
    rows = json.loads(JSON.read_text())["rows"]
    assert set(rows) == {f"{name}, {form}" for name in EXAMPLES for form in FORMS}
    files = {path.stem for path in MODELS.glob("*.py")} - {"__init__"}
    assert {example.build.func.__module__ if hasattr(example.build, "func") else example.build.__module__ for example in EXAMPLES.values()} == {f"examples.models.{name}" for name in files}  # fmt: skip
    for name, row in rows.items():
        # DRAW's graph does not run in the evaluator that computes it in float64, which its reports say.
        assert row["proofs"].keys() == {"weights", "deployment"} | (
            {"algebra"} if name != "draw, SP" else set()
        ), name
        assert all(row["proofs"].values()), name
        assert row["same_graph"], name
        assert row["worst_error"] <= LARGEST, name
    left = {name: row["extra_mul"] for name, row in rows.items() if row["extra_mul"]}
    assert left.keys() == {f"resnet34, {NEGATIVE}", f"conv_vae, {NEGATIVE}"}
