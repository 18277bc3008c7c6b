"""PyTorch's own files (.pt, .pth, .bin, .th), read through ``weights_only=True`` alone: no code of theirs runs.

A zip archive keeps every storage as plain bytes, so tensors are located first (loaded without data) and read one at
a time like those of a safetensors file. Files from before torch 1.6 have no such index and are loaded whole.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam import dtypes
from reparam.checkpoint.header import TensorInfo
from reparam.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth", ".bin", ".th", ".ckpt")
# Where trainers put the state_dict within what they save, the most usual first.
_NESTS = ("state_dict", "model_state_dict", "model", "ema", "ema_state_dict", "params", "net", "module")


@dataclass(frozen=True)
class PickleContents:
    """What a PyTorch file holds.

    Attributes:
        tensors: by key.
        aliases: key -> the earlier key it shares its memory with.
        held: the values of tensors that could not be located in the file.
        nest: keys under which the state_dict was found, outermost first.
        left: entries of the state_dict that are not tensors.
    """

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    held: dict[str, Tensor]
    nest: tuple[str, ...]
    left: tuple[str, ...]


def read_pickle(path: Path) -> PickleContents:
    """Locate the tensors of a PyTorch file.

    Raises:
        CheckpointError: unreadable, holds more than tensors and containers of them, or no state_dict.
    """
    import torch

    value = _load(path, located=True)
    if value is None:
        value = _load(path, located=False)
    state, nest = _state_dict(path, value)
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    left = []
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(key, str):
            left.append(str(key))
            continue
        if tensor.is_sparse or tensor.is_quantized:
            raise CheckpointError(f"{path}: '{key}' is a sparse or quantized tensor: save it dense")
        info, identity, located = _locate(path, key, tensor)
        tensors[key] = info
        if not located:
            held[key] = tensor
        if info.nbytes and identity in seen:
            aliases[key] = seen[identity]
        else:
            seen[identity] = key
    return PickleContents(tensors, aliases, held, nest, tuple(left))


def _load(path: Path, located: bool) -> Any:
    """The file's value; with ``located`` its tensors have places in the file and no data, None where that fails."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if path.suffix == ".pt2":
        raise CheckpointError(
            f"{path}: an exported program, whose loader unpickles: in a Python that trusts it,"
            f" p = torch.export.load('{path.name}'); torch.save(p.state_dict, 'weights.pt')"
        )
    try:
        if not located:
            return torch.load(path, map_location="cpu", weights_only=True)
        if not zipfile.is_zipfile(path):
            return None
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except Exception as error:
        # torch.load raises whatever a broken archive makes it stumble over; every one means the same to the user.
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path}: a TorchScript archive, which is code: in a Python that trusts it,"
                f" m = torch.jit.load('{path.name}'); torch.save(m.state_dict(), 'weights.pt')"
            ) from error
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: empty") from error
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{path}: truncated or not a PyTorch file ({type(error).__name__}: {''.join(first)[:120]})"
        ) from error


def _refusal(path: Path, reason: str) -> str:
    if "GLOBAL" not in reason and "Unsupported" not in reason:
        return f"{path}: truncated or not a PyTorch file"
    return (
        f"{path}: holds more than tensors, and unpickling that would run its code: in a Python that trusts it,"
        f" m = torch.load('{path.name}', weights_only=False); torch.save(m.state_dict(), 'weights.pt')"
    )


def _state_dict(path: Path, value: Any) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    import torch

    nest: tuple[str, ...] = ()
    while isinstance(value, Mapping):
        if any(isinstance(entry, torch.Tensor) for entry in value.values()):
            return value, nest
        inner = next((key for key in _NESTS if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        value, nest = value[inner], (*nest, inner)
    raise CheckpointError(f"{path}: holds no state_dict (looked under {', '.join(_NESTS)})")


def _locate(path: Path, key: str, tensor: Tensor) -> tuple[TensorInfo, Any, bool]:
    """Place of a tensor, an identity equal for tensors that share all their memory, and whether the place is real."""
    dtype = dtypes.code_of(tensor.dtype)
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    view = (tensor.storage_offset(), shape, stride)
    base = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if base is None:
        info = TensorInfo(key, dtype, shape, path, 0, tensor.numel() * tensor.element_size())
        return info, (tensor.untyped_storage().data_ptr(), *view), False
    contiguous = tensor.is_contiguous()
    extent = 1 + sum((e - 1) * s for e, s in zip(shape, stride, strict=True)) if tensor.numel() else 0
    span = (tensor.numel() if contiguous else extent) * tensor.element_size()
    offset = base + tensor.storage_offset() * tensor.element_size()
    if offset + span > path.stat().st_size:
        raise CheckpointError(f"{path}: truncated within '{key}'")
    return (
        TensorInfo(key, dtype, shape, path, offset, span, None if contiguous else stride),
        (base, *view),
        True,
    )
