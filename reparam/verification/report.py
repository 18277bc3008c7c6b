"""The result of a verification: what was checked, by which of the three proofs, and what else is to be known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reparam.errors import CheckFailedError

#: the name of checks of which there is one a layer: those that passed are told together
ROWS = "rows"
#: the three proofs, in the order of a report; checks of two checkpoints belong to "weights"
PROOFS = ("weights", "algebra", "deployment")


# Failures of one proof that are shown one by one.
_SHOWN = 8


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what.
        passed: whether it held.
        max_abs: largest difference, in the output's own units.
        max_rel: the measured error as a share of the output's scale; what ``tolerance`` bounds.
        noise_floor: the same error of the original itself at the deployed dtype, at least 2⁻²⁴.
        tolerance: the bound on ``max_rel``.
        where: which output and input, or what went wrong.
        proof: one of :data:`PROOFS`.
        runs: of the original that ``noise_floor`` is of, where they are more than those of the file.
    """

    name: str
    passed: bool
    max_abs: float | None = None
    max_rel: float | None = None
    noise_floor: float | None = None
    tolerance: float | None = None
    where: str | None = None
    proof: str = "deployment"
    runs: int | None = None

    def __str__(self) -> str:
        """One line for people."""
        text = f"{'ok  ' if self.passed else 'FAIL'} {self.name}"
        if self.max_rel is not None and self.tolerance is not None:
            text += f": {self.max_rel:.1e} of its scale"
            if self.noise_floor is not None:
                runs = f" in {self.runs} runs" if self.runs else ""
                text += (
                    f", {self.max_rel / self.noise_floor:.1f} x the original's own error{runs} "
                    f"(at most {self.tolerance / self.noise_floor:.0f} x)"
                )
            else:
                text += f" (at most {self.tolerance:.1e})"
        return text + (f"; {self.where}" if self.where else "")


@dataclass(frozen=True)
class Report:
    """All checks of one verification; ``passed`` only where there are some and every one did.

    Attributes:
        checks: what was checked.
        notes: what was not, or otherwise than asked: a line each.
        diverges: on failure, the state_dict key at which the file first departs from the original, if it was found.
        by_rounding: whether weights of an ONNX file differ, and all that do by rounding alone.
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    diverges: str | None = None
    by_rounding: bool = False

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def proof(self, name: str) -> tuple[Check, ...]:
        """The checks of one proof, none where it was not run."""
        return tuple(check for check in self.checks if check.proof == name)

    def lines(self) -> list[str]:
        """The report for people: each proof's verdict, its checks below, then what is to be known."""
        lines = []
        for name in PROOFS:
            checks = self.proof(name)
            if checks:
                lines.append(f"{name}: {'passed' if all(c.passed for c in checks) else 'FAILED'}")
                failed = [check for check in checks if not check.passed]
                layers = [check for check in checks if check.passed and check.name == ROWS]
                lines += [f"  {line}" for line in _layers(layers)]
                shown = [c for c in checks if c not in layers and (c.passed or c in failed[:_SHOWN])]
                lines += [f"  {check}" for check in shown]
                lines += [f"  … and {len(failed) - _SHOWN} more that failed"] * (len(failed) > _SHOWN)
            else:
                lines.append(f"{name}: not run")
        if self.diverges:
            lines.append(f"first differs at `{self.diverges}`")
        return lines + [f"note: {note}" for note in self.notes]

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints: ``{"passed", "proofs", "checks": [...], "diverges", "notes"}``.

        ``proofs`` says of each whether it passed, null where it was not run.
        """
        proofs = {name: self.proof(name) for name in PROOFS}
        return {
            "passed": self.passed,
            "proofs": {
                name: all(c.passed for c in found) if found else None for name, found in proofs.items()
            },
            "checks": [asdict(check) for check in self.checks],
            "diverges": self.diverges,
            "notes": list(self.notes),
        }


def _layers(checks: Sequence[Check]) -> Iterator[str]:
    """A line for all layers that were held to the same tolerance and passed."""
    for tolerance in sorted({check.tolerance or 0.0 for check in checks}):
        held = [check for check in checks if (check.tolerance or 0.0) == tolerance]
        worst = max(held, key=lambda check: check.max_rel or 0.0)
        layers = f"{len(held)} layer{'s' * (len(held) > 1)}"
        if not worst.max_rel:
            yield f"ok   {layers} equal bit for bit"
        else:
            yield f"ok   {layers} equal within {tolerance:.1e} of their scale; worst {worst.max_rel:.1e}: {worst.where}"


class VerificationError(CheckFailedError):
    """A verification did not pass; ``report`` holds the details."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
