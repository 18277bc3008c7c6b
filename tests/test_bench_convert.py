"""The conversion benchmark: every job is really run, and none has a place of its own in the turns."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from reparam.bench import convert, generate, worker


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process: importing torch anew for each takes longer than all of them."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "reparam.bench.worker"]
        monkeypatch.setattr(sys, "argv", command[2:])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            worker.main()
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(convert.subprocess, "run", run)


def test_every_job_converts_what_it_says(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_HIDDEN", "_INNER", "_VOCABULARY"):
        monkeypatch.setattr(generate, name, 64)
    told: list[str] = []
    value = convert.bench_convert(0.002, "F32", 1, told.append, tmp_path)
    assert told == ["generating 0.002 GB of F32", *(f"repeat 1 of 1: {name}" for name in convert.order(0))]
    results = {result["name"]: result for result in value["results"]}
    assert list(results) == list(convert.JOBS)
    assert value["settings"]["backend"] == "reference"
    assert results[convert.PLAIN]["ratio"] == results[convert.DURABLE]["durable_ratio"] == 1
    sizes = {name: (result["read_mb"], result["written_mb"]) for name, result in results.items()}
    plain = sizes[convert.PLAIN][0]
    assert sizes["SP → WN"][1] > plain
    assert sizes["GmP → SP"][0] == sizes["SP → GmP"][1] != plain
    assert all(result["seconds"] > 0 and result["peak_mb"] > 0 for result in results.values())
    assert not list(tmp_path.iterdir())


def test_jobs_run_in_another_order_every_time() -> None:
    orders = [convert.order(repeat) for repeat in range(5)]
    assert all(sorted(order) == sorted(convert.JOBS) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert orders == [convert.order(repeat) for repeat in range(5)]
