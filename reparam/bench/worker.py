"""One job of the conversion benchmark, in a process of its own: prints its seconds and its peak memory as JSON.

Imports are not part of the time. numba imports most of itself when a loop first runs, so one does before.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from reparam.checkpoint import convert_checkpoint, running
from reparam.checkpoint.plan import make_plan
from reparam.checkpoint.reading import open_checkpoint
from reparam.checkpoint.selection import Selection
from reparam.kernels.backend import REFERENCE


def main() -> None:
    job = json.loads(sys.argv[1])
    source, output = Path(job["source"]), Path(job["output"])
    backend = REFERENCE
    if job["to"] is not None:
        with running.fast(make_plan(open_checkpoint(source), job["to"], Selection())) as backend:
            pass
    began = time.perf_counter()
    if job["to"] is None:
        output.mkdir()
        for shard in sorted(source.glob("*.safetensors")):
            save_file(load_file(shard), output / shard.name, {"format": "pt"})
            if job["durable"]:
                with (output / shard.name).open("rb") as file:
                    os.fsync(file.fileno())
    else:
        convert_checkpoint(source, job["to"], output=output)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": _peak_mb(), "backend": backend.name}))


def _peak_mb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux's ru_maxrss starts from the peak of the process that started this one; VmHWM is this one's own.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    # macOS counts bytes, others kilobytes.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
