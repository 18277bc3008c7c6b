"""The folder of one training run.

    config.yaml             the resolved recipe, and what network and data it was
    metrics.jsonl, .csv     a line for every step and evaluation; a line for every epoch
    best.safetensors        the weights of the best evaluation, in the tool's own format
    last.safetensors        the weights of the last save; checkpoint-STEP.safetensors: of earlier ones
    state.pt                all of the last save: it alone is what a resumed run starts from
    skeleton.onnx           the network without its weights: what exports the run without its source

A save writes state.pt first and then the weights, each whole or not at all. A run killed in between is resumed from
the new state, which holds the weights too and writes them again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from reparam.checkpoint.staging import staged
from reparam.errors import CheckpointError, OutputError, first_line
from reparam.training.recipe import NETWORK, Recipe
from reparam.training.recipe_file import to_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from reparam.checkpoint.metadata import LayerRecord

_EARLIER = re.compile(r"checkpoint-(\d+)\.safetensors")


class RunFolder:
    """Where a run is written; nothing is before ``create``."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.table = self.path / "metrics.csv"
        self.best = self.path / "best.safetensors"
        self.last = self.path / "last.safetensors"
        self.state = self.path / "state.pt"
        self.skeleton = self.path / "skeleton.onnx"

    @property
    def exists(self) -> bool:
        """Whether the folder is that of a run; other programs too write a config.yaml."""
        return os.path.isfile(self.skeleton) or (os.path.isfile(self.best) and os.path.isfile(self.config))

    def holds(self, file: Path) -> bool:
        """Whether a file is one of those that a new run would replace."""
        return file.resolve() in (own.resolve() for own in self._own())

    def check(self, force: bool = False) -> None:
        """See that a new run can be written here, changing nothing.

        Raises:
            OutputError: it is no folder, it cannot be written, or it holds a run and not ``force``.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: exists and is not a folder: name another place with -o")
        if self._own() and not force:
            raise OutputError(
                f"{self.path}: holds a run already: --resume continues it, --force replaces it, -o names another place"
            )
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise OutputError(f"{self.path}: cannot be written: name another place with -o")

    def create(self, force: bool = False) -> None:
        """Make the folder, without what an earlier run left; other files stay.

        Raises:
            OutputError: as ``check``.
        """
        self.check(force)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self._own():
                file.unlink()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def write_config(self, recipe: Recipe, network: Mapping[str, object] | None = None) -> None:
        """The recipe as it was resolved, and what the caller tells of network and data (plain values)."""
        text = to_yaml(recipe)
        if network:
            text += "# What was trained, on what; not part of the recipe, and nothing here is run.\n"
            text += yaml.safe_dump({NETWORK: dict(network)}, sort_keys=False, allow_unicode=True)
        with staged(self.config, force=True) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def network(self) -> dict[str, Any]:
        """What ``write_config`` was told.

        Raises:
            CheckpointError: there is no config.yaml, or it cannot be read.
        """
        try:
            found = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            return dict(found.get(NETWORK) or {})
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise CheckpointError(
                f"{self.config}: cannot be read: is this the folder of a run? ({why})"
            ) from error

    def save_weights(
        self, file: Path, tensors: Mapping[str, Tensor], records: Mapping[str, LayerRecord]
    ) -> None:
        """Write ``best`` or ``last``, over what is there."""
        from reparam.checkpoint import save_state_dict

        save_state_dict(tensors, records, file, force=True)

    def set_aside(self, step: int, keep: int) -> None:
        """Give ``last``, the weights of ``step``, a second name under which they outlive it; the ``keep`` newest stay."""
        earlier = self.path / f"checkpoint-{step}.safetensors"
        if keep and self.last.exists() and not earlier.exists():
            try:
                earlier.hardlink_to(self.last)
            except OSError:  # a file system without links
                with staged(earlier) as temporary:
                    shutil.copyfile(self.last, temporary)
        for file in self.earlier()[: -keep or None]:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()

    def earlier(self) -> list[Path]:
        """The checkpoints that were set aside, oldest first."""
        found = {path: _EARLIER.fullmatch(path.name) for path in self.path.glob("checkpoint-*.safetensors")}
        return sorted(
            (p for p, match in found.items() if match), key=lambda p: int(p.stem.rpartition("-")[2])
        )

    def _own(self) -> list[Path]:
        """The files of a run that are there; what would continue it comes first."""
        named = [self.state, self.config, self.metrics, self.table, self.best, self.last, self.skeleton]
        return [file for file in named if file.exists() or file.is_symlink()] + self.earlier()
