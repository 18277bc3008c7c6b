"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Files run side by side, a process a core: threads of torch would only be in each other's way. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from safetensors.torch import save_file
from support import SHARED, gaussian

if TYPE_CHECKING:
    from template_files import Templates


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and vectors: $REPARAM_SHARED, or ``shared`` beside the clone."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: set REPARAM_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    """Exports of the plain networks that ``--template`` is tried with."""
    from template_files import Templates

    return Templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of one layer."""
    save_file({"fc.weight": gaussian(40, 40), "fc.bias": gaussian(40)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one, with a file to go along."""
    (tmp_path / "model").mkdir()
    save_file({"fc.weight": gaussian(40, 40)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is synced to the disk: a killed process loses nothing of what it wrote, only the machine's death would."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
