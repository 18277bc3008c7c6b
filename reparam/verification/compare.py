"""ONNX Runtime against the original model in float64, judged by the original's own rounding error.

Many seeded inputs are pooled: noise at several scales, batches of 1, 2 and 7. For each output, with y the
original in float64, f the original in its own dtype and d the deployed file, every error is taken as a share
of the scale of y among the inputs of one noise scale, so that loud inputs do not hide quiet ones:

    max |d − y| ≤ 10 · max(max |f − y|, 2⁻²⁴)        rms (d − y) ≤ 4 · max(rms (f − y), 2⁻²⁴)

NaN or Inf, and a shape, dtype or number of outputs that differs, are failures whatever the numbers say.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from reparam.graph.inputs import InputSpec
from reparam.verification.report import Check, Report

Array = npt.NDArray[Any]

MAX_FACTOR = 10.0
RMS_FACTOR = 4.0
#: Half an ulp of float32: an original that happens to be exact does not ask for an exact file.
FLOOR = 2.0**-24
_NOISE_SCALES = (0.1, 1.0, 10.0)
_FIRST_SIZES, _OTHER_SIZES = (1, 2, 7), (32, 48, 40)
_TINY = 2.0**-126  # scale of an output that is zero everywhere


def compare_onnx(reference: nn.Module, path: Path, specs: Sequence[InputSpec], seed: int = 0) -> Report:
    """Whether the ONNX file computes what ``reference`` computes, on ONNX Runtime's CPU provider.

    Args:
        reference: the untouched original; copies in evaluation mode run in its own dtype and in float64.
        path: the ONNX file.
        specs: its inputs, in the order ``reference`` takes them.
        seed: of the inputs.

    Returns:
        A report; a file that cannot be loaded or run is a failed check, not an exception.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised too
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        return Report((Check("loads in ONNX Runtime", False, where=_line(error)),))
    names, wanted = [value.name for value in session.get_inputs()], [spec.name for spec in specs]
    if names != wanted:
        return Report((Check("inputs", False, where=f"the file takes {names}, expected {wanted}"),))
    outputs = [value.name for value in session.get_outputs()]

    own = copy.deepcopy(reference).eval()
    exact = copy.deepcopy(reference).double().eval()
    pools = [_Pool(name) for name in outputs]
    for scale, inputs in _inputs(specs, seed):
        where = f"input {' '.join(str(list(x.shape)) for x in inputs)} at scale {scale:g}"
        try:
            got = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        except Exception as error:  # as above; a baked-in axis ends here
            return Report((Check("runs in ONNX Runtime", False, where=f"{where}: {_line(error)}"),))
        with torch.no_grad():
            f, y = _arrays(own(*inputs)), _arrays(exact(*(x.double() for x in inputs)))
        if len(got) != len(y):
            text = f"the file has {len(got)} outputs, the original {len(y)}"
            return Report((Check("outputs", False, where=text),))
        for pool, *arrays in zip(pools, y, f, got, strict=True):
            fault = _fault(*arrays)
            if fault is not None:
                return Report((Check(fault[0], False, where=f"output {pool.name}, {where}: {fault[1]}"),))
            pool.add(scale, where, *arrays)
    return Report(tuple(check for pool in pools for check in pool.checks()))


def _inputs(specs: Sequence[InputSpec], seed: int) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(seed)
    leading = {spec.axes[0] for spec in specs}
    dynamic = {axis for spec in specs for axis in spec.dynamic}
    for scale in _NOISE_SCALES:
        for first, other in zip(_FIRST_SIZES, _OTHER_SIZES, strict=True):
            sizes = {axis: first if axis in leading else other for axis in dynamic}
            yield scale, tuple(spec.sample(generator, sizes, scale) for spec in specs)


def _arrays(output: Any) -> list[Array]:
    """The tensors of a model's output, in the order ONNX has them."""
    if isinstance(output, Tensor):
        return [output.numpy()]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [array for item in output for array in _arrays(item)]
    return []


def _fault(y: Array, f: Array, got: Array) -> tuple[str, str] | None:
    """What no tolerance excuses: name of the check and what was found."""
    if got.shape != y.shape:
        return "shape", f"the file gives {list(got.shape)}, the original {list(y.shape)}"
    if got.dtype != f.dtype:
        return "dtype", f"the file gives {got.dtype}, the original {f.dtype}"
    if f.dtype.kind != "f":
        return (
            None
            if np.array_equal(got, y)
            else ("equal", f"{int((got != y).sum())} of {y.size} values differ")
        )
    if y.dtype != np.float64:
        return "reference", f"the original computes in {y.dtype} even when asked for float64: no reference"
    for name, array in (("the file", got), ("the original in float64", y), ("the original", f)):
        if not np.isfinite(array).all():
            return (
                "finite",
                f"{name} gives {int((~np.isfinite(array)).sum())} NaN or Inf of {array.size} values",
            )
    return None


@dataclass
class _Errors:
    """Sums over the inputs of one noise scale; ``own`` is f − y, ``file`` is d − y."""

    scale: float = 0.0
    power: float = 0.0
    own_max: float = 0.0
    own_power: float = 0.0
    file_max: float = 0.0
    file_power: float = 0.0
    where: str = ""


@dataclass
class _Pool:
    """The errors of one output, kept as sums: outputs of any size in the memory of one."""

    name: str
    groups: dict[float, _Errors] = field(default_factory=dict)
    floating: bool = True

    def add(self, noise: float, where: str, y: Array, f: Array, got: Array) -> None:
        self.floating = f.dtype.kind == "f"
        if not self.floating or not y.size:
            return
        group = self.groups.setdefault(noise, _Errors())
        own, file = np.abs(f.astype(np.float64) - y), np.abs(got.astype(np.float64) - y)
        group.scale = max(group.scale, float(np.abs(y).max()))
        group.power += float(np.square(y).sum())
        group.own_max = max(group.own_max, float(own.max()))
        group.own_power += float(np.square(own).sum())
        group.file_power += float(np.square(file).sum())
        if file.max() >= group.file_max:
            index = [int(i) for i in np.unravel_index(file.argmax(), file.shape)]
            group.file_max, group.where = float(file.max()), f"output {self.name}{index}, {where}"

    def checks(self) -> tuple[Check, ...]:
        if not self.floating:
            return (Check("equal", True, where=f"output {self.name}"),)
        if not self.groups:
            return (
                Check("compared", False, where=f"output {self.name} was always empty: nothing was compared"),
            )
        groups = list(self.groups.values())
        worst = max(groups, key=lambda g: g.file_max / max(g.scale, _TINY))
        largest = max(g.file_max for g in groups)
        return (
            _judge(
                "largest error", MAX_FACTOR, largest, worst.where,
                max(g.file_max / max(g.scale, _TINY) for g in groups),
                max(g.own_max / max(g.scale, _TINY) for g in groups),
            ),
            _judge(
                "rms error", RMS_FACTOR, largest, f"output {self.name}",
                math.sqrt(sum(g.file_power / max(g.power, _TINY**2) for g in groups) / len(groups)),
                math.sqrt(sum(g.own_power / max(g.power, _TINY**2) for g in groups) / len(groups)),
            ),
        )  # fmt: skip


def _judge(name: str, factor: float, largest: float, where: str, error: float, own: float) -> Check:
    noise = max(own, FLOOR)
    return Check(name, error <= factor * noise, largest, error, noise, factor * noise, where)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
