"""What a conversion did, as data: the command prints it as tables or as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.checkpoint.plan import Step
from reparam.parameterizations import PARAMETERIZATIONS

if TYPE_CHECKING:
    from reparam.checkpoint.fidelity import Fidelity


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name, key: as people call it; key of its plain weight.
        source, target: parameterizations; equal where nothing was converted.
        status, reason: converted, copied or skipped, and why.
        fidelity: how exactly it converts back; None where that was not measured.
        bias: role its bias is kept under; "bias" in a GmP layer means that λ was not usable.
        axis, assumed_axis: of the output units; whether it was a guess.
        shape, dtype: of the plain weight.
    """

    name: str
    key: str
    source: str
    target: str
    status: str
    reason: str
    shape: tuple[int, ...]
    dtype: str
    fidelity: Fidelity | None
    bias: str | None
    axis: int
    assumed_axis: bool

    @classmethod
    def of(cls, step: Step, fidelity: Fidelity | None) -> LayerReport:
        layer = step.layer
        record = step.record
        target = record.kind if record is not None else layer.kind
        bias = record.bias if record is not None else layer.bias
        return cls(
            layer.name, layer.key, layer.kind, target, step.status, step.reason, layer.spec.shape, layer.spec.dtype,
            fidelity, bias, layer.spec.unit.axis, layer.assumed_axis,
        )  # fmt: skip

    @property
    def scale_inside(self) -> bool:
        """GmP without a usable λ: the layer computes φ(r·uᵀx + b)."""
        return self.target == "gmp" and self.bias == "bias"

    @property
    def inexact_at(self) -> list[list[int]]:
        """Indices in the plain weight of the first weights that do not come back bit for bit."""
        return [] if self.fidelity is None else [_unravel(at, self.shape) for at in self.fidelity.where]

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "name": self.name,
            "from": self.source,
            "to": self.target,
            "status": self.status,
            "reason": self.reason,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }
        if self.assumed_axis and self.status == "converted":
            value["axis"] = f"assumed {self.axis}"
        if self.scale_inside:
            value["scale"] = "inside"
        if self.fidelity is not None and self.fidelity.weights:
            value["inexact"] = self.fidelity.inexact
            value["bias_inexact"] = self.fidelity.bias_inexact
            value["max_row_error"] = self.fidelity.max_row_error
            if self.fidelity.where:
                value["inexact_at"] = self.inexact_at
        return value


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor of a checkpoint.

    Attributes:
        source, output: paths; ``output`` was not written by a dry run.
        to: target parameterization.
        layers: every layer.
        others: every other tensor, copied byte for byte, with the reason why it is no layer.
        bytes_before, bytes_after: sizes of the files of tensors.
        seconds: of the whole conversion.
        dry_run: nothing was written, and what depends on values is not decided.
        notes: what the reader found worth telling.
        backend: what mapped angles, "compiled" or "reference"; None where no layer was mapped to GmP or from it.
    """

    source: Path
    output: Path
    to: str
    layers: tuple[LayerReport, ...]
    others: dict[str, str]
    bytes_before: int
    bytes_after: int
    seconds: float
    dry_run: bool
    notes: tuple[str, ...]
    backend: str | None

    def with_status(self, status: str) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == status)

    @property
    def roundtrip(self) -> dict[str, Any]:
        """Totals over the layers that were decoded again; all zero when the target is SP, which needs no decoding."""
        measured = [layer.fidelity for layer in self.layers if layer.fidelity is not None]
        return {
            "checked": sum(f.weights for f in measured),
            "inexact": sum(f.inexact for f in measured),
            "bias_inexact": sum(f.bias_inexact for f in measured),
            "max_row_error": max((f.max_row_error for f in measured), default=0.0),
            "rows": sum(f.rows for f in measured),
        }

    def to_json(self) -> dict[str, Any]:
        assert self.to in PARAMETERIZATIONS
        return {
            "output": None if self.dry_run else str(self.output),
            "planned_output": str(self.output),
            "to": self.to,
            "layers": [layer.to_json() for layer in self.layers],
            "others": [
                {"name": name, "status": "copied", "reason": reason} for name, reason in self.others.items()
            ],
            "roundtrip": self.roundtrip,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": round(self.seconds, 3),
            "backend": self.backend,
            "notes": list(self.notes),
        }


def _unravel(at: int, shape: tuple[int, ...]) -> list[int]:
    """Index of a flat position in C order."""
    index = []
    for extent in reversed(shape):
        at, i = divmod(at, extent)
        index.append(i)
    return index[::-1]
