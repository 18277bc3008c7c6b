"""Whole state_dicts: for models that fit in memory, as training and export hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reparam import dtypes
from reparam.checkpoint import dialects
from reparam.checkpoint import metadata as records_format
from reparam.checkpoint.metadata import LayerRecord
from reparam.checkpoint.reading import Checkpoint, open_checkpoint
from reparam.checkpoint.staging import refuse_existing, require_space, staged
from reparam.checkpoint.writing import SafetensorsWriter, file_size

if TYPE_CHECKING:
    from torch import Tensor


def load_state_dict(path: Path | str) -> tuple[dict[str, Tensor], dict[str, LayerRecord]]:
    """Every tensor of a checkpoint, tied ones sharing memory, and how its reparameterized layers are held.

    Tensors of those layers have the names that the layers give them, whatever ``--layout`` the file was written with.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    tensors, records = state_dict_of(checkpoint), checkpoint.records
    names = names_in_layers(tensors, records)
    return {names.get(key, key): tensor for key, tensor in tensors.items()}, records


def names_in_layers(keys: Iterable[str], records: Mapping[str, LayerRecord]) -> dict[str, str]:
    """What layers call the tensors of recorded weight normalizations: ``weight_g`` and ``weight_v``."""
    return {
        key: dialects.key_of(dialects.DEFAULT_DIALECT["wn"], plain, role)
        for plain, (_, *pair) in dialects.weight_norm_keys(keys).items()
        if plain in records and records[plain].kind == "wn"
        for role, key in zip(("weight_g", "weight_v"), pair, strict=True)
    }


def state_dict_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of an open checkpoint by its name in the file, tied ones sharing memory."""
    tensors = {key: checkpoint.tensor(key) for key in checkpoint.tensors if key not in checkpoint.aliases}
    for alias, key in checkpoint.aliases.items():
        tensors[alias] = tensors[key]
    return {key: tensors[key] for key in checkpoint.tensors}


def save_state_dict(
    tensors: Mapping[str, Tensor], records: Mapping[str, LayerRecord], path: Path | str, force: bool = False
) -> None:
    """Write a state_dict as one safetensors file that appears whole or not at all.

    Args:
        tensors: by key; those that share memory are stored once, as the safetensors library does it.
        records: how reparameterized layers are held, by the key of their plain weight.
        path: to write; refused if it exists, unless ``force``.

    Raises:
        OutputError: the file exists, or its folder is missing, read-only or full.
    """
    path = Path(path)
    metadata = {"format": "pt"}
    if records:
        metadata[records_format.KEY] = records_format.dump(records)
    own: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    for key, tensor in tensors.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() and identity in first:
            metadata[key] = first[identity]
        else:
            first[identity] = key
            own[key] = tensor.detach().cpu()
    entries = {key: (dtypes.code_of(tensor.dtype), tuple(tensor.shape)) for key, tensor in own.items()}
    refuse_existing(path, force)
    require_space(path, file_size(entries, metadata))
    with staged(path, force) as temporary, SafetensorsWriter(temporary, entries, metadata) as writer:
        for key, tensor in own.items():
            writer.write(key, tensor)
