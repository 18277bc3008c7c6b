"""How numbers and tables look on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.checkpoint import Progress


def size(nbytes: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def count(number: int, what: str) -> str:
    """3 layers, 1 layer."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def shape(extents: Sequence[int]) -> str:
    return "×".join(str(extent) for extent in extents) or "scalar"


def shorten(names: Sequence[str], most: int = 6) -> str:
    """A list of names that fits a line."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout, as wide as it must be: names are to be read and copied whole."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        grid.add_column(heading, justify="right" if heading in _NUMBERS else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    Console(width=10_000, highlight=False).print(grid, crop=False, overflow="ignore")


_NUMBERS = frozenset(
    {"fan-in", "units", "layers", "size", "inexact", "row error", "‖w‖ min", "‖w‖ max", "dead", "zeros"}
)


@contextmanager
def progress(what: str) -> Iterator[Progress | None]:
    """A bar with throughput and remaining time on stderr, nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, now="")
        yield lambda done, total, now: bar.update(task, completed=done, total=total, now=now)
