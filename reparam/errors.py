"""Every failure a user can meet. A message is one line: it names the file, tensor or option, and the mend."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 4


class ReparamError(ValueError):
    """Bad input or usage. The command line prints the message and exits with 2."""


class CheckpointError(ReparamError):
    """A file that cannot be read as a checkpoint: malformed, truncated, missing, of a kind that is refused."""


class OutputError(ReparamError):
    """A place that cannot be written: it exists, is read-only, is too small, or would collide."""


class SelectionError(ReparamError):
    """The options select nothing, or name what is not there."""


class NonFiniteError(ReparamError):
    """A tensor holds NaN or Inf."""


class ArchitectureError(ReparamError):
    """The named architecture cannot be had, or does not fit the checkpoint."""


class DataError(ReparamError):
    """A dataset that cannot be read, or does not fit the model."""


class CheckFailedError(ReparamError):
    """A check ran and did not pass. The command line exits with 1."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str]) -> str:
    """The first few names as a message gives them, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more
