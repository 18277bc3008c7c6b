"""The whole chain on bundled data: convert, fine-tune, fold, export, compare; each stage as its command."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from reparam import pipeline
from reparam.errors import OutputError

if TYPE_CHECKING:
    from reparam.pipeline import FinetuneRun, OnnxExport

ARCH = "reparam.demo.model:small_cnn"
STEPS, RATE = 60, 0.003
SPEC = "N,1,28,28"
_WEIGHTS = "small_cnn.safetensors"
_CONVERTED = "small_cnn.gmp.safetensors"


@dataclass(frozen=True)
class DemoResult:
    """What the stages gave, and how many seconds all of them took."""

    converted: Path
    run: FinetuneRun
    exported: OnnxExport
    seconds: float


def run_demo(out: Path, echo: Callable[[str], None], *, force: bool = False) -> DemoResult:
    """Run the chain in ``out`` on the bundled CNN and Fashion-MNIST subset.

    Args:
        out: folder to work in; made if missing. Weights and images are copied there, so that every command
            that is printed can be typed again.
        echo: gets each stage's command line and its result.
        force: replace the files of an earlier demo.

    Raises:
        OutputError: ``out`` holds something and not ``force``, or cannot be written.
        CheckFailedError: a stage did not pass.
    """
    from reparam.graph import parse_spec
    from reparam.training import Recipe

    began = time.perf_counter()
    source, data, run_folder = out / _WEIGHTS, out / "data", out / "run"
    converted, onnx = out / _CONVERTED, out / "small_cnn.onnx"
    _copy_bundled(out, data, force)
    again = ["--force"] if force else []

    def show(*command: str | Path) -> None:
        echo(f"\n$ reparam {shlex.join([*map(str, command), *again])}")

    echo(f"A small CNN, trained on Fashion-MNIST, and 3,000 of its images are in {out}.")

    rules = ["--to", "gmp", "--fold-bn", "--mean-norm"]
    show("convert", source, "--arch", ARCH, *rules, "--calibrate", data, "-o", converted)
    pipeline.convert_model(
        source, "gmp", ARCH, output=converted, fold_bn=True, mean_norm=True, calibrate=data, force=force
    )
    echo(f"  wrote {converted} ({converted.stat().st_size:,} bytes; {source.stat().st_size:,} before)")

    recipe = ["--steps", str(STEPS), "--lr", str(RATE)]
    show("finetune", converted, "--arch", ARCH, "--data", data, *recipe, "-o", run_folder)
    run = pipeline.finetune(converted, ARCH, data, run_folder, Recipe(steps=STEPS, lr=RATE), force=force)
    result = run.result
    echo(
        f"  test accuracy {result.before.value:.1%} -> {result.best.value:.1%} (the best, of step {result.best.step})"
    )
    echo(f"  wrote {run.best} ({run.best.stat().st_size:,} bytes)")

    show("export", run.best, "--arch", ARCH, "--input", SPEC, "--onnx", onnx)
    exported = pipeline.export_onnx(run.best, ARCH, [parse_spec(SPEC)], onnx, force=force)
    for check in exported.report.checks:
        echo(f"  {check}")
    echo(f"  wrote {onnx} ({exported.nbytes:,} bytes)")

    seconds = time.perf_counter() - began
    echo(f"\nThe ONNX file computes what the fine-tuned network computes. {seconds:.0f} s.")
    return DemoResult(converted, run, exported, seconds)


def _copy_bundled(out: Path, data: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder: name another place with --out")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise OutputError(
            f"{out}: not empty: --force replaces an earlier demo's files, --out names another place"
        )
    try:
        data.mkdir(parents=True, exist_ok=True)
        for item in (resources.files("reparam.demo") / "data").iterdir():
            with resources.as_file(item) as file:
                if item.name.endswith(".gz"):
                    shutil.copyfile(file, data / item.name)
                elif item.name == _WEIGHTS:
                    shutil.copyfile(file, out / item.name)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from error
