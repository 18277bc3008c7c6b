"""Checkpoints of every kind as one thing: named tensors, located in files, read one at a time.

Bytes are read, not mapped: a mapped file's pages count as this process's memory for as long as it stays open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from reparam.checkpoint import metadata as records_format
from reparam.checkpoint import pickles
from reparam.checkpoint.cutting import Range, runs, within
from reparam.checkpoint.header import TensorInfo, read_header
from reparam.checkpoint.metadata import LayerRecord
from reparam.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
_USUAL_NAMES = ("model.safetensors", "pytorch_model.bin")
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a model on disk; headers are read, values are not.

    Attributes:
        path: as the user named it.
        folder: the folder it is, None for a single file.
        index: the index file of a sharded set, else None.
        files: the files that hold tensors, in order.
        tensors: by key, aliases included.
        aliases: key -> the key whose memory it shares.
        metadata: ``__metadata__`` of each file without the ``reparam`` value and the aliases.
        records: how its reparameterized layers are held, by the key of their plain weight.
        config: the folder's config.json, empty without.
        notes: what the reader found worth telling.
    """

    path: Path
    folder: Path | None
    index: Path | None
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str] = field(default_factory=dict)
    metadata: dict[Path, dict[str, str]] = field(default_factory=dict)
    records: dict[str, LayerRecord] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    held: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each shared one counted once."""
        return sum(_plain_size(info) for key, info in self.tensors.items() if key not in self.aliases)

    def tensor(self, key: str) -> Tensor:
        """The value of one tensor, contiguous, in memory of its own.

        Raises:
            CheckpointError: the file ended early or cannot be read.
        """
        info = self.tensors[key]
        return self.part(key, info.shape, [(0, extent) for extent in info.shape]).contiguous()

    def part(self, key: str, shape: tuple[int, ...], box: Sequence[Range]) -> Tensor:
        """A box of one tensor seen in ``shape``, without the rest being read: a view where it is in memory anyway.

        Raises:
            CheckpointError: the file ended early or cannot be read.
        """
        info = self.tensors[key]
        if key in self.held:
            return self.held[key].reshape(shape)[within(box, [(0, 0)] * len(box))]
        if info.stride is not None:
            whole = self._read(info, [0], info.nbytes).as_strided(info.shape, info.stride)
            return whole.reshape(shape)[within(box, [(0, 0)] * len(box))]
        size = info.nbytes // max(1, info.numel)
        starts, length = runs(shape, box)
        extents = [stop - start for start, stop in box]
        return self._read(info, [start * size for start in starts], length * size).reshape(extents)

    def _read(self, info: TensorInfo, starts: Sequence[int], length: int) -> Tensor:
        """``length`` bytes from each start, which count from the tensor's first byte."""
        import torch

        from reparam.dtypes import torch_dtype

        buffer = torch.empty(len(starts) * length, dtype=torch.uint8)
        if len(buffer):
            view = buffer.numpy().data
            with _open(info) as file:
                for start in starts:
                    file.seek(info.offset + start)
                    left = view[:length]
                    view = view[length:]
                    while left:
                        count = file.readinto(left)
                        if not count:
                            raise CheckpointError(f"{info.file}: truncated within '{info.key}'")
                        left = left[count:]
        return buffer.view(torch_dtype(info.dtype))

    def blocks(self, key: str) -> Iterator[memoryview]:
        """The bytes of one tensor in C order, a few MB at a time, without looking at them."""
        info = self.tensors[key]
        if key in self.held or info.stride is not None:
            yield bytes_of(self.tensor(key))
            return
        left = info.nbytes
        with _open(info) as file:
            file.seek(info.offset)
            while left:
                block = file.read(min(left, _BLOCK))
                if not block:
                    raise CheckpointError(f"{info.file}: truncated within '{key}'")
                left -= len(block)
                yield memoryview(block)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _plain_size(info: TensorInfo) -> int:
    from reparam import dtypes

    return dtypes.nbytes(info.dtype, info.shape)


def _open(info: TensorInfo) -> Any:
    try:
        return info.file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error.strerror})") from error


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Find and read the headers of a checkpoint: a file, an index of shards, or a folder of either.

    Raises:
        CheckpointError: nothing there, of a kind that is refused, malformed, or incomplete.
    """
    path = Path(path)
    try:
        return _open_any(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from error


def _open_any(path: Path) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path, path, path.parent)
    return _open_file(path, path, None)


def _open_folder(folder: Path) -> Checkpoint:
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if not found:
        found = sorted(folder.glob("*.safetensors"))
    if not found:
        found = sorted(f for suffix in pickles.SUFFIXES for f in folder.glob(f"*{suffix}"))
    if not found:
        raise CheckpointError(f"{folder}: no *.safetensors, index of shards or PyTorch file in this folder")
    if len(found) > 1:  # trainers leave optimizer.pt and the like beside a model
        found = [file for file in found if file.name in _USUAL_NAMES] or found
    if len(found) > 1:
        names = ", ".join(f.name for f in found[:4])
        raise CheckpointError(
            f"{folder}: several checkpoints ({names}{', …' * (len(found) > 4)}): name one of them"
        )
    if found[0].name.endswith(INDEX_SUFFIX):
        return _open_index(folder, found[0], folder)
    return _open_file(folder, found[0], folder)


def _open_file(path: Path, file: Path, folder: Path | None) -> Checkpoint:
    config = _config(folder) if folder else {}
    if file.suffix == ".safetensors":
        tensors, values = read_header(file)
        return _assemble(path, folder, None, [(file, tensors, values)], config)
    if file.suffix not in (*pickles.SUFFIXES, ".pt2"):
        raise CheckpointError(
            f"{file}: not a checkpoint: *.safetensors, *{INDEX_SUFFIX}, {', '.join(pickles.SUFFIXES)}"
        )
    contents = pickles.read_pickle(file)
    notes = []
    if contents.nest:
        notes.append(f"state_dict found under {' / '.join(contents.nest)}")
    if contents.left:
        notes.append(f"not tensors, left behind: {', '.join(contents.left[:5])}")
    return Checkpoint(
        path, folder, None, (file,), contents.tensors, contents.aliases, {file: {"format": "pt"}}, {}, config,
        tuple(notes), contents.held,
    )  # fmt: skip


def _open_index(path: Path, index: Path, folder: Path) -> Checkpoint:
    value = _json(index)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    shards: dict[str, tuple[Path, dict[str, TensorInfo], dict[str, str]]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name or _escapes(name):
            raise CheckpointError(
                f"{index}: '{key}' is mapped to {name!r}, which is not a file of this folder"
            )
        if name not in shards:
            file = folder / name
            if not file.exists():
                lost = sum(1 for other in weight_map.values() if other == name)
                raise CheckpointError(
                    f"{index}: shard {name} is missing ({lost} tensors): fetch it into {folder}"
                )
            shards[name] = (file, *read_header(file))
        if key not in shards[name][1]:
            raise CheckpointError(f"{index}: '{key}' is not in {name}")
    return _assemble(path, folder, index, list(shards.values()), _config(folder))


def _escapes(name: str) -> bool:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    return ".." in parts or PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)


def _assemble(
    path: Path,
    folder: Path | None,
    index: Path | None,
    shards: list[tuple[Path, dict[str, TensorInfo], dict[str, str]]],
    config: dict[str, Any],
) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    records: dict[str, LayerRecord] = {}
    kept: dict[Path, dict[str, str]] = {}
    named: dict[str, str] = {}
    for file, infos, values in shards:
        for key, info in infos.items():
            if key in tensors:
                raise CheckpointError(f"{file}: '{key}' is in {tensors[key].file.name} too")
            tensors[key] = info
        text = values.get(records_format.KEY)
        if text is not None:
            records |= records_format.load(text, str(file))
        kept[file] = {k: v for k, v in values.items() if k != records_format.KEY}
        named |= kept[file]
    # safetensors' own convention for tied tensors: __metadata__ maps the dropped key to the kept one.
    aliases = {
        alias: key
        for alias, key in named.items()
        if key in tensors and alias not in tensors and alias != "format"
    }
    for alias, key in aliases.items():
        tensors[alias] = tensors[key]
        for values in kept.values():
            values.pop(alias, None)
    files = tuple(file for file, _, _ in shards)
    return Checkpoint(path, folder, index, files, tensors, aliases, kept, records, config)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return _json(file) if file.exists() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value
