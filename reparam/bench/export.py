"""An export with its proof against a bare one, a refit, and the exported file's latency.

    torch.onnx.export     the plain model, by torch alone
    export + verify       the converted model folded, exported, compared with the original
    refit                 the same weights put into the file that is there

Files are run in ONNX Runtime on the CPU, turn by turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.bench.machine import describe
from reparam.errors import CheckFailedError

if TYPE_CHECKING:
    from torch import nn

    from reparam.graph import InputSpec

BARE, PROVEN, REFIT = "torch.onnx.export", "export + verify", "refit"
#: what export and verification may take in bare exports, and a refit in seconds
BAR_PROVEN, BAR_REFIT = 2.0, 2.0

#: the converted model, the folded one, the file, its inputs -> whether the file is right
Verify = Callable[["nn.Module", "nn.Module", Path, "Sequence[InputSpec]"], bool]


@dataclass(frozen=True)
class StageResult:
    """Medians over the repeats of one stage.

    Attributes:
        name: of the stage.
        seconds: until its file is on disk.
        ratio: median over the repeats of its time to the bare export's of the same repeat.
    """

    name: str
    seconds: float
    ratio: float


@dataclass(frozen=True)
class FileResult:
    """How one file runs.

    Attributes:
        name: of the stage that made it.
        milliseconds: median of one run at batch size 1, or what the dynamic axes are otherwise at their least.
        ratio: median of its time to the bare export's in the same turn.
        operators: how many nodes of each.
        nbytes: of the file.
    """

    name: str
    milliseconds: float
    ratio: float
    operators: dict[str, int]
    nbytes: int


def bench_export(
    plain: nn.Module,
    specs: Sequence[InputSpec],
    verify: Verify,
    repeats: int,
    turns: int,
    tell: Callable[[str], None],
    to: str = "gmp",
) -> dict[str, Any]:
    """Time the stages, and then the files.

    Args:
        plain: a network; not changed.
        specs: its inputs.
        verify: the proof that belongs to an export.
        repeats: of every stage; medians are reported.
        turns: of every file.
        tell: told what is being done.
        to: the parameterization the network is exported from.

    Returns:
        JSON value: machine, settings, a :class:`StageResult` a stage, a :class:`FileResult` a file.

    Raises:
        CheckFailedError: the exported file is not right.
    """
    from reparam.graph import convert

    plain = plain.eval()
    converted = convert(plain, to)
    with tempfile.TemporaryDirectory(prefix="reparam-bench-") as name:
        folder = Path(name)
        stages = _stages(plain, converted, specs, verify, folder)
        times: dict[str, list[float]] = {stage: [] for stage in stages}
        for repeat in range(repeats + 1):
            for stage, job in stages.items():
                tell(f"{stage}: " + (f"repeat {repeat} of {repeats}" if repeat else "once before"))
                began = time.perf_counter()
                job()
                if repeat:  # the first time, modules are imported
                    times[stage].append(time.perf_counter() - began)
        tell(f"running the files {turns} times")
        files = _run({BARE: folder / "bare.onnx", PROVEN: folder / "proven.onnx"}, specs, turns)
    return {
        "what": "export",
        "machine": describe(),
        "settings": {"model": type(plain).__name__, "to": to, "repeats": repeats, "turns": turns},
        "stages": [
            asdict(StageResult(stage, statistics.median(took), _ratio(took, times[BARE])))
            for stage, took in times.items()
        ],
        "files": [asdict(file) for file in files],
    }


def _stages(
    plain: nn.Module, converted: nn.Module, specs: Sequence[InputSpec], verify: Verify, folder: Path
) -> dict[str, Callable[[], None]]:
    from reparam.export import export_onnx_model
    from reparam.export.onnx import bare_export
    from reparam.graph import fold
    from reparam.onnxfile.refit import refit

    def bare() -> None:
        bare_export(plain, specs).save(folder / "bare.onnx", external_data=False)

    def proven() -> None:
        folded = fold(converted)
        export_onnx_model(folded, specs, folder / "proven.onnx")
        if not verify(converted, folded, folder / "proven.onnx", specs):
            raise CheckFailedError("the exported file does not compute what the model computes")

    def refitted() -> None:
        refit(folder / "proven.onnx", fold(converted).state_dict(), folder / "refit.onnx")

    return {BARE: bare, PROVEN: proven, REFIT: refitted}


def _run(files: dict[str, Path], specs: Sequence[InputSpec], turns: int) -> list[FileResult]:
    import onnx
    import onnxruntime
    import torch

    generator = torch.Generator().manual_seed(0)
    sizes = {axis: 1 for spec in specs for axis in spec.dynamic}
    inputs = {spec.name: spec.sample(generator, sizes).numpy() for spec in specs}
    sessions = {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    times: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(turns + 1):
        # Whoever runs second finds the caches as the first left them: the order changes every turn.
        for name in list(sessions)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            sessions[name].run(None, inputs)
            if turn:
                times[name].append(time.perf_counter() - began)
    return [
        FileResult(
            name,
            statistics.median(times[name]) * 1e3,
            _ratio(times[name], times[BARE]),
            dict(Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)),
            path.stat().st_size,
        )
        for name, path in files.items()
    ]


def _ratio(times: Sequence[float], bases: Sequence[float]) -> float:
    return statistics.median(took / base for took, base in zip(times, bases, strict=True))
