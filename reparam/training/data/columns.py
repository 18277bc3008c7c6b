"""Which columns of a table are inputs and which the target."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reparam.errors import DataError

#: what a target column is called where none is named; without such a name it is the last
_USUAL = ("label", "labels", "target", "targets", "class", "y")
_LISTED = 12


def choose(
    file: str, names: Sequence[str], inputs: Sequence[str] | str, target: Sequence[str] | str | None
) -> tuple[list[int], list[int], list[str]]:
    """Indices of the input columns and of the target columns, and notes on what was not said.

    Args:
        file: for messages.
        names: of all columns, in order; empty strings for a table without names.
        inputs, target: each a name, an index from 0, a range of indices "0-7", or several of these, in a sequence or
            with commas between. Without ``target``: the column of a usual name, or the last. Without ``inputs``: all
            that are no target.

    Raises:
        DataError: a column is missing, or is both input and target.
    """
    notes = []
    if target is None or target == ():
        usual = [name for name in _USUAL if name in map(str.lower, names)]
        chosen = [[name.lower() for name in names].index(usual[0])] if usual else [len(names) - 1]
        notes.append(
            f"target: column {shown(names, chosen[0])}"
            + ("" if usual else " (the last)")
            + "; --target names another"
        )
    else:
        chosen = _find(file, names, target, "--target")
    taken = _find(file, names, inputs, "--inputs")
    if both := set(taken) & set(chosen):
        raise DataError(
            f"{file}: column {shown(names, min(both))} is both input and target; leave it out of --inputs"
        )
    taken = taken or [index for index in range(len(names)) if index not in chosen]
    if not taken:
        raise DataError(f"{file}: no column but the target; a dataset needs inputs")
    return taken, chosen, notes


def shown(names: Sequence[str], index: int) -> str:
    """A column in a message: its name, or its index where it has none."""
    return f"`{names[index]}`" if names[index] else str(index)


def listing(names: Sequence[str]) -> str:
    """All columns in a message."""
    if not any(names):
        return f"0 to {len(names) - 1}"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _find(file: str, names: Sequence[str], wanted: Sequence[str] | str, option: str) -> list[int]:
    if isinstance(wanted, str):
        wanted = [wanted] if wanted in names else wanted.split(",")
    found: list[int] = []
    for column in (str(column).strip() for column in wanted):
        if column in names:
            indices = [names.index(column)]
        elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", column):
            first = int(match[1])
            indices = list(range(first, int(match[2] or first) + 1))
        else:
            indices = []
        if not indices or indices[-1] >= len(names):
            raise DataError(f"{file}: {option} {column}: no such column; there are {listing(names)}")
        found += [index for index in indices if index not in found]
    return found
