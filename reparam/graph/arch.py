"""The network a checkpoint belongs to: found by reference, filled strictly.

Only what the user names is run; a reference recorded in a file never is.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import reduce
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from reparam.checkpoint import dialects
from reparam.checkpoint.metadata import LayerRecord
from reparam.dtypes import torch_dtype
from reparam.errors import ArchitectureError

_LISTED = 8
_SHAPES = 3
#: what a wrapper puts before every key of the model it wraps: DataParallel and DDP, torch.compile
_WRAPPERS = ("module.", "_orig_mod.")


def load_architecture(ref: str, args: Mapping[str, str] | None = None) -> nn.Module:
    """Build the network that ``ref`` names.

    Args:
        ref: ``pkg.module:callable`` or ``path/to/file.py:callable``. Modules are also looked for in the
            working directory, a file's imports beside the file.
        args: keyword arguments of the callable; Python literals are read as such, the rest as strings.

    Raises:
        ArchitectureError: the reference leads nowhere, the callable raised, or returned no ``nn.Module``.
    """
    model = call_reference(ref, "--arch", {key: _literal(value) for key, value in (args or {}).items()})
    if not isinstance(model, nn.Module):
        name = ref.rpartition(":")[2]
        raise ArchitectureError(f"--arch {ref}: `{name}` returned a {type(model).__name__}, not an nn.Module")
    return model


def call_reference(ref: str, option: str, args: Mapping[str, object]) -> object:
    """What the callable that ``ref`` names returns.

    Args:
        ref: as for :func:`load_architecture`.
        option: that gave it, for messages.
        args: keyword arguments of the callable.

    Raises:
        ArchitectureError: the reference leads nowhere, or the callable raised.
    """
    place, colon, name = ref.rpartition(":")
    if not colon or not place or not name:
        raise ArchitectureError(f"{option} {ref}: expected pkg.module:callable or path/to/file.py:callable")
    is_file = place.endswith(".py")
    with _on_path(Path(place).resolve().parent if is_file else Path.cwd()):
        module = (
            _load_file(f"{option} {ref}", Path(place)) if is_file else _load_module(f"{option} {ref}", place)
        )
        try:
            build = reduce(getattr, name.split("."), module)
        except AttributeError:
            raise ArchitectureError(
                f"{option} {ref}: `{place}` has no `{name}`{_others(module, name)}"
            ) from None
        if not callable(build):
            raise ArchitectureError(f"{option} {ref}: `{name}` is a {type(build).__name__}, not a callable")
        try:
            returned: object = build(**args)
        except Exception as error:
            mend = " (--arch-arg gives it arguments)" if option == "--arch" else ""
            raise ArchitectureError(f"{option} {ref}: `{name}` raised {told(error)}{mend}") from error
    return returned


def wrapper_prefix(keys: Iterable[str], own: Iterable[str]) -> str:
    """What a wrapper that the architecture lacks left before every key of a file: "module.", "_orig_mod.", both, or "".

    Args:
        keys: of the file.
        own: keys of the architecture.
    """
    keys, own, prefix = list(keys), list(own), ""
    while keys:
        found = next((w for w in _WRAPPERS if all(key.startswith(prefix + w) for key in keys)), None)
        if found is None or any(key.startswith(found) for key in own):
            break
        prefix += found
    return prefix


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load ``tensors`` into ``model``, strictly.

    Args:
        model: filled in place; every key and shape of its state_dict must match. Of the keys of one shared parameter
            a file may lack all but one.
        tensors: values by key; cast to the model's dtypes.
        where: the file, for messages.

    Raises:
        ArchitectureError: keys are missing or unexpected, shapes differ, or a shared parameter would have two values;
            nothing was loaded.
    """
    own = model.state_dict(keep_vars=True)
    problems = []
    shared: dict[int, list[str]] = {}
    for key, value in own.items():
        if key in tensors:
            shared.setdefault(id(value), []).append(key)
    # Files from before torch 0.4.1 lack BatchNorm's counter, which nothing is computed with; torch fills it in too.
    missing = {
        key
        for key, value in own.items()
        if key not in tensors and id(value) not in shared and not key.endswith("num_batches_tracked")
    }
    unexpected = tensors.keys() - own.keys()
    if missing:
        problems.append(f"missing from the file: {_patterns(missing)}")
    if unexpected:
        problems.append(f"unknown to the architecture: {_patterns(unexpected)}")
        if any(key.endswith(("weight_g", ".original0")) for key in unexpected):
            problems.append(
                "it holds weight normalization where the architecture has none: `reparam convert` it --to sp first"
            )
    shapes = [
        f"{key} is {list(tensors[key].shape)} in the file, {list(own[key].shape)} in the architecture"
        for key in own
        if key in tensors and isinstance(own[key], Tensor) and own[key].shape != tensors[key].shape
    ]
    if shapes:
        problems.append(
            "; ".join(shapes[:_SHAPES]) + (f" and {len(shapes) - _SHAPES} more" * (len(shapes) > _SHAPES))
        )
    problems += [
        f"{first} and {other} differ in the file and are one parameter in the architecture"
        for first, *others in shared.values()
        for other in others
        if tensors[first] is not tensors[other] and not torch.equal(tensors[first], tensors[other])
    ]
    if problems:
        raise ArchitectureError(f"{where} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict({**model.state_dict(), **tensors})


def hold_as(model: nn.Module, tensors: Mapping[str, Tensor], records: Mapping[str, LayerRecord]) -> None:
    """Cast a plain architecture's parameters and buffers to the dtypes a file has them in, in place.

    Args:
        model: shared parameters stay shared.
        tensors: of the file, by key.
        records: of its reparameterized layers: those are cast to the dtypes of their plain weight and bias.
    """
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    for key, record in records.items():
        dtypes[key] = torch_dtype(record.spec.dtype)
        if record.spec.bias_dtype is not None:
            dtypes[dialects.bias_key(key)] = torch_dtype(record.spec.bias_dtype)
    for key, value in model.state_dict(keep_vars=True).items():
        dtype = dtypes.get(key)
        if (
            dtype is not None
            and dtype.is_floating_point
            and isinstance(value, Tensor)
            and value.is_floating_point()
        ):
            value.data = value.data.to(dtype)


def _load_file(what: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ArchitectureError(f"{what}: no file `{path}`")
    # A name of its own, so that a user's model.py never shadows a module of that name.
    name = f"_reparam_arch_{re.sub(r'[^0-9A-Za-z]', '_', str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered while it runs: dataclasses and pickle look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ArchitectureError(f"{what}: `{path}` raised {told(error)}") from error
    return module


def _load_module(what: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ArchitectureError(f"{what}: no module `{error.name}`") from error
        raise ArchitectureError(f"{what}: importing `{name}` raised {told(error)}") from error


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """``folder`` is searched for modules, as for a script that lies in it."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _others(module: ModuleType, name: str) -> str:
    """What a module defines that can be called, the nearest to a name first, for a message."""
    defined = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    defined.sort(key=lambda key: -_alike(key.lower(), name.lower()) - _alike(key, name))
    more = f" and {len(defined) - _LISTED} more" if len(defined) > _LISTED else ""
    return f", but {', '.join(defined[:_LISTED])}{more}" if defined else ""


def _alike(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def told(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _patterns(keys: Iterable[str]) -> str:
    """Keys with their numbers folded into N: ``layers.N.weight (12)``."""
    counts: dict[str, list[str]] = {}
    for key in sorted(keys):
        counts.setdefault(re.sub(r"\d+", "N", key), []).append(key)
    shown = [
        members[0] if len(members) == 1 else f"{pattern} ({len(members)})"
        for pattern, members in counts.items()
    ]
    more = f" and {len(shown) - _LISTED} more patterns" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more
