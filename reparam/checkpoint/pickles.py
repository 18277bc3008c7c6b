"""PyTorch's own files (.pt, .pth, .bin, .th), read through ``weights_only=True`` alone: no code of theirs runs.

A zip archive keeps every storage as plain bytes, so tensors are located first (loaded without data) and read one at
a time like those of a safetensors file. Files from before torch 1.6 have no such index and are loaded whole.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam import dtypes
from reparam.checkpoint.archives import record_places
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
    left: list[str]


def read_pickle(path: Path) -> PickleContents:
    """Locate the tensors of a PyTorch file.

    Raises:
        CheckpointError: unreadable, holds more than tensors and containers of them, or no state_dict.
    """
    if path.suffix == ".pt2":
        raise CheckpointError(
            f"{path}: an exported program, whose loader unpickles: in a Python that trusts it,"
            f" p = torch.export.load('{path.name}'); torch.save(p.state_dict, 'weights.pt')"
        )
    contents = _located(path) or _collect(path, _load(path), None)
    assert contents is not None
    return contents


def _located(path: Path) -> PickleContents | None:
    """Tensors by their places in the file, none of their bytes read; None where the file does not allow that."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    places = record_places(path)
    if places is None:
        return None
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs what it then raises
    try:
        with FakeTensorMode():
            value = _load(path)
    except CheckpointError:
        return None  # said again, and better, when it is really loaded
    finally:
        logging.disable(before)
    return _collect(path, value, places)


def _collect(path: Path, value: Any, places: Mapping[int, int] | None) -> PickleContents | None:
    """Sort a loaded value; without ``places`` its tensors are held, with them None where one cannot be located."""
    import torch

    state, nest = _state_dict(path, value)
    contents = PickleContents({}, {}, {}, nest, [])
    seen: dict[Any, str] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(key, str):
            contents.left.append(str(key))
            continue
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: '{key}' is a sparse or quantized tensor: save it dense")
        try:
            dtype = dtypes.code_of(tensor.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: '{key}': {error}") from error
        storage: Any = tensor.untyped_storage()
        if places is None:
            held = tensor.detach().resolve_conj().resolve_neg()
            info = TensorInfo(key, dtype, tuple(held.shape), path, 0, held.numel() * held.element_size())
            contents.held[key] = held
        else:
            found = _place(path, key, tensor, dtype, places)
            if found is None:
                return None
            info = found
        base = storage.data_ptr() if places is None else storage._checkpoint_offset
        identity = (
            base,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            dtype,
            tensor.is_conj(),
        )
        contents.tensors[key] = info
        if info.nbytes and identity in seen:
            contents.aliases[key] = seen[identity]
        else:
            seen[identity] = key
    return contents


def _load(path: Path) -> Any:
    """The file's value, without any code of its own being run."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    """The innermost of the usual nests; tensors beside a nest are a trainer's notes, such as the best accuracy."""
    import torch

    nest: tuple[str, ...] = ()
    while isinstance(value, Mapping):
        inner = next((key for key in _NESTS if isinstance(value.get(key), Mapping) and value[key]), None)
        if inner is None:
            if any(isinstance(entry, torch.Tensor) and isinstance(key, str) for key, entry in value.items()):
                return value, nest
            inner = _only_state(value)
            if inner is None:
                break
        value, nest = value[inner], (*nest, str(inner))
    raise CheckpointError(
        f"{path}: holds no state_dict (looked under {', '.join(_NESTS)}, and for a single dictionary of tensors)"
    )


def _only_state(value: Mapping[Any, Any]) -> Any:
    """Key of the one entry that is a dictionary of tensors, as {'generator': ...} has it; None without or of several."""
    import torch

    found = [
        key
        for key, entry in value.items()
        if isinstance(entry, Mapping) and any(isinstance(tensor, torch.Tensor) for tensor in entry.values())
    ]
    return found[0] if len(found) == 1 else None


def _place(path: Path, key: str, tensor: Tensor, dtype: str, places: Mapping[int, int]) -> TensorInfo | None:
    """Where a tensor's bytes lie; None where torch's computed offset is no record, or its bytes are not its values."""
    storage: Any = tensor.untyped_storage()
    base = getattr(storage, "_checkpoint_offset", None)
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    if not tensor.numel():
        return TensorInfo(key, dtype, shape, path, 0, 0)
    if base is None or places.get(base) != storage.nbytes() or tensor.is_conj() or tensor.is_neg():
        return None
    contiguous = tensor.is_contiguous()
    extent = (
        tensor.numel() if contiguous else 1 + sum((e - 1) * s for e, s in zip(shape, stride, strict=True))
    )
    begin, span = tensor.storage_offset() * tensor.element_size(), extent * tensor.element_size()
    if begin + span > places[base]:
        return None
    return TensorInfo(key, dtype, shape, path, base + begin, span, None if contiguous else stride)
