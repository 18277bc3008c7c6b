"""The result of a verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from reparam.errors import CheckFailedError


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
    """

    name: str
    passed: bool
    max_abs: float | None = None
    max_rel: float | None = None
    noise_floor: float | None = None
    tolerance: float | None = None
    where: str | None = None

    def __str__(self) -> str:
        """One line for people."""
        text = f"{'ok  ' if self.passed else 'FAIL'} {self.name}"
        if self.max_rel is not None and self.noise_floor is not None and self.tolerance is not None:
            text += (
                f": {self.max_rel:.1e} of the output's scale, {self.max_rel / self.noise_floor:.1f} x the "
                f"original's own error (at most {self.tolerance / self.noise_floor:.0f} x)"
            )
        return text + (f"; {self.where}" if self.where else "")


@dataclass(frozen=True)
class Report:
    """All checks of one verification; ``passed`` only where there are some and every one did."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints: ``{"passed", "checks": [{"name", "passed", ...}]}``."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


class VerificationError(CheckFailedError):
    """A verification did not pass; ``report`` holds the details."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
