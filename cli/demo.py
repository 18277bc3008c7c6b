"""reparam demo: the whole chain on bundled real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to work in.")] = Path("reparam-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo's files.")] = False,
) -> None:
    """Run the whole chain on bundled real data."""
    from reparam.demo import run_demo

    run_demo(out, print, force=force)
