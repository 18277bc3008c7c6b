"""How numbers and tables look on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
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


def fitting(names: Sequence[str], width: int, most: int = 6) -> str:
    """The same with as many names as fit ``width`` characters; at least one."""
    shown = 1
    while shown < min(most, len(names)) and len(shorten(names, shown + 1)) <= width:
        shown += 1
    return shorten(names, shown)


def units_read(axes: Mapping[str, int]) -> Iterator[str]:
    """A line for each axis that units are taken to be on; ``axes`` by the names of layers whose tensors leave it open."""
    for axis in sorted(set(axes.values())):
        names = [name for name, own in axes.items() if own == axis]
        line = f"{count(len(names), 'layer')}: units taken on axis {axis} (--axis GLOB={axis + 1} if transposed): "
        yield line + fitting(names, _LINE - len(line))


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[str] | None = None,
    alike: Collection[str] = (),
) -> None:
    """Print a table to stdout: on a terminal no wider than that, the last column in several lines where it must be.

    Other columns are as wide as they must be, and where stdout is no terminal all are: names are to be read and copied whole.
    ``numbers`` are the headings of columns that stand to the right; ``alike`` those of columns that, where all cells are the
    same and the table would be wider than 80 characters, are told once in a line above it.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if alike and rows and sum(_widths(headings, rows)) + _GAP * (len(headings) - 1) > _NARROW:
        headings, rows = _told_once(headings, rows, alike)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        last = i == len(headings) - 1
        grid.add_column(
            heading,
            justify="right" if heading in (_NUMBERS if numbers is None else numbers) else "left",
            no_wrap=not last,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    width = 10_000
    if sys.stdout.isatty():
        fixed = sum(_widths(headings, rows)[:-1])
        width = max(shutil.get_terminal_size().columns, fixed + _GAP * len(headings) + _LEAST)
    Console(width=width, highlight=False).print(grid, crop=False, overflow="ignore")


def _widths(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(headings, *rows, strict=True)]


def _told_once(
    headings: Sequence[str], rows: Sequence[Sequence[str]], alike: Collection[str]
) -> tuple[list[str], list[list[str]]]:
    """What is left of a table without those columns ``alike`` whose cells are the same, after a line that tells them."""
    same = [
        i for i, heading in enumerate(headings) if heading in alike and len({row[i] for row in rows}) == 1
    ]
    if same:
        print(f"every layer: {', '.join(f'{headings[i]} {rows[0][i]}' for i in same)}")
    left = [i for i in range(len(headings)) if i not in same]
    return [headings[i] for i in left], [[row[i] for i in left] for row in rows]


# Between two columns; and of a last column, where the others leave it less.
_GAP, _LEAST = 3, 20
# Of a table on any terminal, where names allow it; and of a line of names.
_NARROW, _LINE = 80, 100
_NUMBERS = frozenset(
    {
        "fan-in",
        "units",
        "layers",
        "size",
        "inexact",
        "biases",
        "row error",
        "‖w‖ min",
        "‖w‖ max",
        "dead",
        "zeros",
    }
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
