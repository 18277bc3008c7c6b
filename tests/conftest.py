"""Fixtures of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import SHARED


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and vectors: $REPARAM_SHARED, or ``shared`` beside the clone."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: set REPARAM_SHARED")
    return SHARED
