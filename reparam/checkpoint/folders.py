"""Where a conversion's output goes, and what goes along with the tensors: the other files of a folder, the index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reparam import dtypes
from reparam.checkpoint.pickles import SUFFIXES
from reparam.checkpoint.plan import FilePlan
from reparam.checkpoint.reading import INDEX_SUFFIX, Checkpoint
from reparam.errors import OutputError
from reparam.parameterizations import PARAMETERIZATIONS

# Weights in other formats would be the unconverted model under the converted one's name.
_OTHER_WEIGHTS = (".safetensors", *SUFFIXES, ".pt2", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


def output_path(checkpoint: Checkpoint, to: str, output: Path | None) -> Path:
    """The file or folder to write: ``output``, else NAME.to.safetensors or NAME-to/ beside the input.

    Raises:
        OutputError: ``output`` is not of the input's kind.
    """
    # Not resolved: the output of a link stands beside the link, under its name. But "." is called what it is.
    source = Path(os.path.abspath(checkpoint.path))
    if checkpoint.folder is None:
        if output is None:
            return source.with_name(f"{_base(source.name.removesuffix(source.suffix), '.')}.{to}.safetensors")
        if output.is_dir():
            raise OutputError(f"-o {output}: a folder; the input is one file: name a .safetensors file")
        if output.suffix != ".safetensors":
            raise OutputError(
                f"-o {output}: the output is a safetensors file: name it {output.stem}.safetensors"
            )
        return output
    if output is None:
        folder = Path(os.path.abspath(checkpoint.folder))
        return folder.with_name(f"{_base(folder.name, '-')}-{to}")
    if output.is_file() or output.suffix == ".safetensors":
        raise OutputError(f"-o {output}: a file; the input is a folder: name a folder")
    return output


def _base(name: str, separator: str) -> str:
    """A name without the mark an earlier conversion left on it."""
    for known in PARAMETERIZATIONS:
        name = name.removesuffix(f"{separator}{known}")
    return name


def refuse_in_place(checkpoint: Checkpoint, target: Path) -> None:
    """Raise OutputError where writing ``target`` would replace the input, whatever --force says."""
    place = target.resolve()
    inputs = {file.resolve() for file in checkpoint.files} | {checkpoint.path.resolve()}
    if place in inputs or any(place in file.parents for file in inputs):
        raise OutputError(
            f"{target}: is the input or holds it; conversion is never in place: -o names another place"
        )


def refuse_losing(checkpoint: Checkpoint, target: Path) -> None:
    """Raise OutputError where replacing the folder ``target`` would remove what the new one does not have."""
    if checkpoint.folder is None or not target.is_dir():
        return
    made = {entry.name for entry in _companions(checkpoint)}
    made |= {file_in(checkpoint, target, file).relative_to(target).parts[0] for file in checkpoint.files}
    made |= {checkpoint.index.name} if checkpoint.index is not None else set()
    lost = sorted(entry.name for entry in target.iterdir() if entry.name not in made)
    if lost:
        names = ", ".join(lost[:4]) + ", …" * (len(lost) > 4)
        raise OutputError(
            f"{target}: also holds {names}, which --force would remove: move it away, or use -o"
        )


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """The other entries of a folder, which go along."""
    if checkpoint.folder is None:
        return []
    left = {file.name for file in checkpoint.files}
    return [
        entry
        for entry in sorted(checkpoint.folder.iterdir())
        if entry.name not in left
        and not entry.name.endswith((".index.json", ".partial"))
        and not (entry.is_file() and entry.suffix in _OTHER_WEIGHTS)
    ]


def _weights_below(folder: str, names: list[str]) -> list[str]:
    """Files of weights in a subfolder, which do not go along either."""
    return [name for name in names if Path(name).suffix in _OTHER_WEIGHTS and (Path(folder) / name).is_file()]


def companions_size(checkpoint: Checkpoint) -> int:
    """Bytes of the files that go along."""
    files = [
        f for entry in _companions(checkpoint) for f in ([entry] if entry.is_file() else entry.rglob("*"))
    ]
    return sum(file.stat().st_size for file in files if file.is_file())


def prepare(checkpoint: Checkpoint, temporary: Path) -> None:
    """Make the output folder and copy what goes along; nothing for a single file."""
    if checkpoint.folder is None:
        return
    temporary.mkdir()
    for entry in _companions(checkpoint):
        if entry.is_dir():
            shutil.copytree(entry, temporary / entry.name, ignore=_weights_below)
        else:
            shutil.copyfile(entry, temporary / entry.name)


def file_in(checkpoint: Checkpoint, temporary: Path, source: Path) -> Path:
    """Where the tensors of ``source`` are written."""
    if checkpoint.folder is None:
        return temporary
    if source.suffix != ".safetensors":
        return temporary / "model.safetensors"
    return temporary / source.relative_to(checkpoint.folder)


def finish(checkpoint: Checkpoint, temporary: Path, files: Mapping[Path, FilePlan]) -> None:
    """Write the index of a sharded set, last."""
    if checkpoint.index is None:
        return
    assert checkpoint.folder is not None
    old: dict[str, Any] = json.loads(checkpoint.index.read_text(encoding="utf-8"))
    metadata = old.get("metadata")
    total = sum(dtypes.nbytes(*entry) for plan in files.values() for entry in plan.entries.values())
    names = {file: file.relative_to(checkpoint.folder).as_posix() for file in files}
    index = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": {key: names[file] for file, plan in files.items() for key in sorted(plan.entries)},
    }
    name = checkpoint.index.name
    assert name.endswith(INDEX_SUFFIX)
    (temporary / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
