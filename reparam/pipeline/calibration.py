"""Inputs of a network for calibrating its means: IDX images as fine-tuning takes them, or one array of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reparam.errors import DataError, ReparamError

if TYPE_CHECKING:
    from torch import Tensor, nn

_NAMED = 8
_SAMPLES = 10_000
_LOADABLE = (".npz", ".safetensors")


def calibration_inputs(path: Path, model: nn.Module) -> Tensor:
    """The inputs in ``path``, shape (N, ...).

    Args:
        path: a folder that :func:`reparam.training.data.load_data` reads, up to 10,000 of whose training samples are
            standardized with their own mean and deviation as fine-tuning does it; or a .npz or .safetensors file that holds one array (N, ...), or FILE:NAME for one of
            several, taken as it is: floats, cast to the model's dtype, or integers.
        model: is run on the first two of them, in evaluation mode, to see that it takes them.

    Raises:
        DataError: they cannot be read, or the model does not take them.
    """
    inputs = _read(path)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if inputs.is_floating_point() and dtype is not None:
        inputs = inputs.to(dtype)
    _try(model, inputs[:2], path)
    return inputs


def _read(path: Path) -> Tensor:
    if path.is_dir():
        return _of_dataset(str(path))
    file, colon, name = str(path).rpartition(":")
    chosen = name if colon and not path.exists() and Path(file).suffix in _LOADABLE else None
    path = path if chosen is None else Path(file)
    if path.suffix not in _LOADABLE:
        raise DataError(f"{path}: --calibrate takes a dataset's folder, or an array in .npz or .safetensors")
    arrays = _npz(path) if path.suffix == ".npz" else _safetensors(path)
    if chosen is None and len(arrays) != 1:
        held = ", ".join(list(arrays)[:_NAMED]) + f" and {len(arrays) - _NAMED} more" * (len(arrays) > _NAMED)
        mend = f": name one, {path}:{next(iter(arrays))}" if arrays else ""
        raise DataError(f"{path}: holds {held or 'nothing'}: one array of inputs is expected{mend}")
    name = next(iter(arrays)) if chosen is None else chosen
    if name not in arrays:
        raise DataError(f"{path}: holds no `{name}`, but {', '.join(list(arrays)[:_NAMED]) or 'nothing'}")
    inputs = arrays[name]
    if not inputs.dim() or not len(inputs):
        raise DataError(f"{path}: `{name}` is {list(inputs.shape)}: expected inputs (N, ...), N at least 1")
    kind = str(inputs.dtype).removeprefix("torch.")
    if not inputs.is_floating_point() and kind not in ("int32", "int64"):
        raise DataError(
            f"{path}: `{name}` is {kind}: give what the network takes, float or int64; images scaled as in training"
        )
    return inputs


def _of_dataset(path: str) -> Tensor:
    from reparam.training.data import Batches, load_data

    data = load_data(path)
    size = min(len(data.train), _SAMPLES)
    chosen = Batches(data, data.train, batch_size=size, shuffle=size < len(data.train))
    inputs, _ = next(chosen.epoch(0))
    return inputs


def _npz(path: Path) -> dict[str, Tensor]:
    import zipfile
    import zlib

    import numpy as np
    import torch

    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        lines = str(error).splitlines()
        raise DataError(f"{path}: cannot be read ({lines[0] if lines else type(error).__name__})") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from reparam.checkpoint import load_state_dict

    try:
        return load_state_dict(path)[0]
    except ReparamError as error:
        raise DataError(str(error)) from error


def _try(model: nn.Module, inputs: Tensor, path: Path) -> None:
    import torch

    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(inputs)
    except Exception as error:  # whatever a user's forward raises
        lines = str(error).splitlines()
        told = lines[0] if lines else type(error).__name__
        raise DataError(
            f"{path}: the network does not take inputs of {list(inputs.shape[1:])}: {told}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
