"""Proof by running: a checkpoint of several GB converts in bounded memory, survives kills, and loses nothing on a full disk.

Too long for the test-suite; its result is committed beside it.

    python tests/proofs/large_checkpoint.py --size 6 --dir /a/disk/with/40/GB --json tests/proofs/large_checkpoint.json

Needs GNU time (/usr/bin/time) and, for the full disk, the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reparam.bench.generate import generate
from reparam.bench.machine import describe

#: DESIGN: 600 MB and three times the largest tensor in float32.
BASE_MB, TENSOR_FACTOR = 600, 3
KILLS = 10


def convert(source: Path, output: Path, to: str) -> list[str]:
    return [sys.executable, "-m", "reparam", "convert", str(source), "--to", to, "-o", str(output), "--json"]


def measured(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """The command's JSON, its seconds and its peak resident MB, by GNU time."""
    done = subprocess.run(["/usr/bin/time", "-v", *command], capture_output=True, text=True, check=True)
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    elapsed = re.search(r"Elapsed \(wall clock\) time .*: (?:(\d+):)?(\d+):([\d.]+)", done.stderr)
    assert peak is not None
    assert elapsed is not None
    hours, minutes, seconds = elapsed.groups()
    return (
        json.loads(done.stdout),
        int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds),
        int(peak[1]) / 1e3,
    )


def largest_tensor_mb(folder: Path) -> float:
    """Largest tensor of a set, in float32."""
    from reparam.checkpoint import open_checkpoint

    return max(info.numel for info in open_checkpoint(folder).tensors.values()) * 4 / 1e6


def leftovers(work: Path, output: Path) -> list[str]:
    return [entry.name for entry in work.iterdir() if entry.name.startswith(f".{output.name}.")]


def memory(source: Path, work: Path) -> list[dict[str, Any]]:
    """Peak memory of every direction, against the bar."""
    rows = []
    steps = [(source, "wn"), (source, "gmp"), (work / "out-gmp", "sp"), (work / "out-wn", "gmp")]
    for i, (start, to) in enumerate(steps):
        output = work / (f"out-{to}" if i < 2 else f"back-{i}")
        report, seconds, peak = measured(convert(start, output, to))
        bar = BASE_MB + TENSOR_FACTOR * largest_tensor_mb(source)
        rows.append(
            {
                "from": start.name, "to": to, "seconds": seconds, "peak_mb": round(peak), "bar_mb": round(bar),
                "passed": peak <= bar, "roundtrip": report["roundtrip"], "bytes_after": report["bytes_after"],
            }
        )  # fmt: skip
        print(rows[-1], file=sys.stderr)
        if i >= 2:
            shutil.rmtree(output)
    return rows


def kills(source: Path, work: Path, usual: float, seed: int) -> dict[str, Any]:
    """SIGKILL at random moments of a conversion; afterwards one runs to its end."""
    moments, output = random.Random(seed), work / "killed"
    rows: list[dict[str, Any]] = []
    while len(rows) < KILLS:
        after = moments.uniform(0.05, 0.95) * usual
        process = subprocess.Popen(
            convert(source, output, "gmp"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.communicate(timeout=after)
            # Done before its moment came: nothing was killed, which proves nothing.
            print(f"finished within {after:.1f} s: another moment", file=sys.stderr)
            shutil.rmtree(output)
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        rows.append(
            {"after_s": round(after, 2), "status": process.returncode, "final_exists": output.exists(),
             "temporaries": len(leftovers(work, output))}
        )  # fmt: skip
        print(rows[-1], file=sys.stderr)
    subprocess.run(convert(source, output, "gmp"), check=True, stdout=subprocess.DEVNULL)
    same = all((output / f.name).read_bytes() == f.read_bytes() for f in (work / "out-gmp").glob("*.json"))
    same = same and all(_equal(f, output / f.name) for f in (work / "out-gmp").glob("*.safetensors"))
    passed = same and not leftovers(work, output) and not any(row["final_exists"] for row in rows)
    shutil.rmtree(output)
    return {"kills": rows, "next_run_identical": same, "passed": passed}


def _equal(a: Path, b: Path) -> bool:
    with a.open("rb") as left, b.open("rb") as right:
        while block := left.read(1 << 24):
            if right.read(1 << 24) != block:
                return False
        return not right.read(1)


def full_disk(work: Path) -> dict[str, Any]:
    """A filesystem that is too small, seen beforehand and found out underway: nothing is lost or left."""
    small = work / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500m", "tmpfs", str(small)], check=True)
    rows = []
    try:
        source = generate(small / "sp", 0.6, "BF16")  # GmP takes about 1.1 GB
        before = {file.name: file.read_bytes()[:4096] for file in source.iterdir()}
        for underway in (False, True):
            command = convert(source, small / "out", "gmp")
            if underway:  # the check beforehand is blinded, so that the write itself fails
                code = (
                    "import sys, reparam.checkpoint.converting as c; c.require_space = lambda *a: None;"
                    "from reparam.cli.main import main; sys.exit(main(sys.argv[1:]))"
                )
                command = [sys.executable, "-c", code, *command[3:]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            after = {file.name: file.read_bytes()[:4096] for file in source.iterdir()}
            rows.append(
                {"found": "underway" if underway else "beforehand", "status": done.returncode,
                 "message": done.stderr.strip().replace(str(small), "…"), "input_untouched": before == after,
                 "left": sorted(entry.name for entry in small.iterdir())}
            )  # fmt: skip
            print(rows[-1], file=sys.stderr)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    passed = all(row["status"] == 2 and row["input_untouched"] and row["left"] == ["sp"] for row in rows)
    return {"runs": rows, "passed": passed}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=6.0, help="GB of the SP checkpoint")
    parser.add_argument("--dir", type=Path, default=None, help="work here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="write the result here")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="reparam-proof-", dir=options.dir))
    try:
        print("generating", file=sys.stderr)
        source = generate(work / "sp", options.size, "BF16", shards=4, seed=options.seed)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "reparam", "inspect", str(source), "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        inspected = time.perf_counter() - began
        rows = memory(source, work)
        usual = next(row["seconds"] for row in rows if row["to"] == "gmp")
        value: dict[str, Any] = {
            "machine": describe(),
            "settings": {"gigabytes": options.size, "dtype": "BF16", "shards": 4, "seed": options.seed},
            "checkpoint_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
            "inspect_seconds": round(inspected, 3),
            "memory": rows,
            "kill": kills(source, work, usual, options.seed),
            "full_disk": full_disk(work),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    value["passed"] = (
        all(row["passed"] for row in rows) and value["kill"]["passed"] and value["full_disk"]["passed"]
    )
    options.json.write_text(json.dumps(value, indent=2) + "\n")
    print("passed" if value["passed"] else "FAILED")
    return 0 if value["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
