"""One job of the conversion benchmark, in a process of its own: prints its seconds and its peak memory as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from reparam.checkpoint import convert_checkpoint, mapping  # noqa: F401  (imports are not part of the time)


def main() -> None:
    job = json.loads(sys.argv[1])
    source, output = Path(job["source"]), Path(job["output"])
    began = time.perf_counter()
    if job["to"] is None:
        output.mkdir()
        for shard in sorted(source.glob("*.safetensors")):
            save_file(load_file(shard), output / shard.name, {"format": "pt"})
    else:
        convert_checkpoint(source, job["to"], output=output)
    seconds = time.perf_counter() - began
    # Linux counts kilobytes, macOS bytes.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
