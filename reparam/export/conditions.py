"""Under which torch's exporter runs: without a word, and without searches for cycles."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the exporter prints, logs and warns about its own workings is dropped; what it raises is not."""
    disabled = logging.root.manager.disable
    sink: Any = io.StringIO()
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for cycles: an export makes some 100,000 objects, among which Python would look for them over and over.

    Afterwards they are not in use, and cheap to drop: so this is for all of an export.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
