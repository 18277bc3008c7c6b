"""The catalogue of faults, every one caught by the proofs that should; and files without one, which pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import FAULTS, NETWORKS, Exported, exported, faulty

from reparam.verification import pools
from reparam.verification.report import PROOFS

TABLE = Path(__file__).parent / "proofs" / "fault_catalogue.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: exported(build(), specs, folder / f"{name}.onnx") for name, (build, specs) in NETWORKS.items()
    }


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_caught(name: str, bases: dict[str, Exported], tmp_path: Path) -> None:
    fault, base = FAULTS[name], bases[FAULTS[name].network]
    report = base.verify(faulty(base, fault, tmp_path / "faulty.onnx"))
    assert not report.passed
    failed = {proof for proof in PROOFS if any(not check.passed for check in report.proof(proof))}
    assert set(fault.proofs) <= failed, report.lines()
    assert fault.is_named(report.diverges), report.diverges
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is False
    # Each is far from what rounding does, or a fault of the weights, or one that no tolerance excuses.
    found = [
        check for check in report.proof("deployment") if check.name == "largest error" and not check.passed
    ]
    assert all(check.max_rel is not None and check.max_rel > 100 * pools.FLOOR for check in found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NETWORKS)
def test_files_without_a_fault_pass(name: str, seed: int, bases: dict[str, Exported]) -> None:
    report = bases[name].verify(seed=seed)
    assert report.passed, report.lines()
    assert report.diverges is None
    assert all(report.proof(proof) for proof in PROOFS), report.lines()


def test_the_table_is_of_this_catalogue_and_nothing_is_missed() -> None:
    """At every type each fault was caught, and where a layer is at fault it was named."""
    table = json.loads(TABLE.read_text())
    assert len(table["faults"]) == len(FAULTS) >= 20
    for name, fault in FAULTS.items():
        row = table["faults"][name]
        assert set(row) == set(fault.kinds)
        for kind, found in row.items():
            assert found["proofs"], (name, kind)
            assert fault.is_named(found["key"]), (name, kind, found["key"])
    at_fault = [fault for fault in FAULTS.values() if fault.key or fault.layer]
    assert len(at_fault) >= 20
    assert not any(fault.is_named(None) or fault.is_named("nowhere.weight") for fault in at_fault)
    assert len(table["clean"]) >= 20
    for name, seeds in table["clean"].items():
        assert len(seeds) == 5, name
        assert all(seed["passed"] for seed in seeds), name
