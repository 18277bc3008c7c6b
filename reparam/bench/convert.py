"""Conversion against the least one can do: safetensors' own load_file and save_file of the same shards.

Each job runs in a process of its own, so that its peak memory is its own; jobs are interleaved, so that a machine that
slows down slows all of them, in another order every time, so that none always follows the same.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.bench.machine import describe

PLAIN, DURABLE = "load_file + save_file", "load_file + save_file + fsync"
#: job -> (source folder, target parameterization or None for a plain copy). A conversion ends with its bytes on disk.
JOBS: dict[str, tuple[str, str | None]] = {
    PLAIN: ("sp", None),
    DURABLE: ("sp", None),
    "SP → WN": ("sp", "wn"),
    "SP → GmP": ("sp", "gmp"),
    "GmP → SP": ("gmp", "sp"),
}


@dataclass(frozen=True)
class JobResult:
    """Medians over the repeats of one job.

    Attributes:
        name: of the job.
        seconds: wall time, imports not counted.
        ratio: median over the repeats of this job's time to the plain copy's of the same repeat.
        durable_ratio: the same to the plain copy with an fsync of every shard.
        peak_mb: largest resident memory of its process.
        read_mb, written_mb: sizes of its input and output.
    """

    name: str
    seconds: float
    ratio: float
    durable_ratio: float
    peak_mb: float
    read_mb: float
    written_mb: float


def bench_convert(
    gigabytes: float, dtype: str, repeats: int, tell: Callable[[str], None], where: Path | None = None
) -> dict[str, Any]:
    """Time the jobs on a generated sharded checkpoint.

    Args:
        gigabytes: size of the SP checkpoint, at least: it has four layers of a language model.
        dtype: safetensors code.
        repeats: of every job; medians are reported.
        tell: told what is being done.
        where: folder to work in, which needs about five times the size; the system's temporary folder without.

    Returns:
        JSON value: machine, settings, and a :class:`JobResult` a job.
    """
    # generate() imports torch; this module does not need it.
    from reparam.bench.generate import generate

    folder = Path(tempfile.mkdtemp(prefix="reparam-bench-", dir=where))
    try:
        tell(f"generating {gigabytes:g} GB of {dtype}")
        generate(folder / "sp", gigabytes, dtype)
        made = _megabytes(folder / "sp") / 1e3
        backend = _run(folder, "sp", "gmp", keep=True)["backend"]
        runs: dict[str, _Runs] = {name: [] for name in JOBS}
        for repeat in range(repeats):
            for name in order(repeat):
                source, to = JOBS[name]
                tell(f"repeat {repeat + 1} of {repeats}: {name}")
                runs[name].append(_run(folder, source, to, durable=name == DURABLE))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = [_median(name, found, runs[PLAIN], runs[DURABLE]) for name, found in runs.items()]
    return {
        "what": "convert",
        "machine": describe(),
        "settings": {
            "gigabytes": round(made, 3),
            "dtype": dtype,
            "repeats": repeats,
            "cache": "warm",
            "backend": backend,
        },
        "results": [vars(result) for result in results],
    }


def order(repeat: int) -> list[str]:
    """All jobs, shuffled in a way of each repeat's own."""
    return random.Random(repeat).sample(list(JOBS), len(JOBS))


_Runs = list[dict[str, Any]]


def _median(name: str, runs: _Runs, plain: _Runs, durable: _Runs) -> JobResult:
    def ratio(bases: _Runs) -> float:
        pairs = zip(runs, bases, strict=True)
        return float(statistics.median(run["seconds"] / base["seconds"] for run, base in pairs))

    return JobResult(
        name,
        statistics.median(run["seconds"] for run in runs),
        ratio(plain),
        ratio(durable),
        max(run["peak_mb"] for run in runs),
        runs[0]["read_mb"],
        runs[0]["written_mb"],
    )


def _run(
    folder: Path, source: str, to: str | None, keep: bool = False, durable: bool = False
) -> dict[str, Any]:
    """One job in a process of its own; its output is deleted unless it is to be kept as a source."""
    output = folder / (to if keep and to else "out")
    for file in (folder / source).iterdir():
        with file.open("rb") as stream:  # warm the cache
            while stream.read(1 << 24):
                pass
    job = json.dumps({"source": str(folder / source), "to": to, "output": str(output), "durable": durable})
    done = subprocess.run(
        [sys.executable, "-m", "reparam.bench.worker", job], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the job failed: {done.stderr.strip()[-400:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["read_mb"], result["written_mb"] = _megabytes(folder / source), _megabytes(output)
    if not keep:
        shutil.rmtree(output)
    return result


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
