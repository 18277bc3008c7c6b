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
from functools import reduce
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from reparam.errors import ArchitectureError

_LISTED = 8


def load_architecture(ref: str, args: Mapping[str, str] | None = None) -> nn.Module:
    """Build the network that ``ref`` names.

    Args:
        ref: ``pkg.module:callable`` or ``path/to/file.py:callable``. Modules are also looked for in the
            working directory, a file's imports beside the file.
        args: keyword arguments of the callable; Python literals are read as such, the rest as strings.

    Raises:
        ArchitectureError: the reference leads nowhere, the callable raised, or returned no ``nn.Module``.
    """
    place, colon, name = ref.rpartition(":")
    if not colon or not place or not name:
        raise ArchitectureError(f"--arch {ref}: expected pkg.module:callable or path/to/file.py:callable")
    is_file = place.endswith(".py")
    with _on_path(Path(place).resolve().parent if is_file else Path.cwd()):
        module = _load_file(ref, Path(place)) if is_file else _load_module(ref, place)
        try:
            build = reduce(getattr, name.split("."), module)
        except AttributeError:
            raise ArchitectureError(f"--arch {ref}: `{place}` has no `{name}`") from None
        if not callable(build):
            raise ArchitectureError(f"--arch {ref}: `{name}` is a {type(build).__name__}, not a callable")
        try:
            model = build(**{key: _literal(value) for key, value in (args or {}).items()})
        except Exception as error:
            raise ArchitectureError(
                f"--arch {ref}: `{name}` raised {_told(error)} (--arch-arg gives it arguments)"
            ) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"--arch {ref}: `{name}` returned a {type(model).__name__}, not an nn.Module")
    return model


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load ``tensors`` into ``model``, strictly.

    Args:
        model: filled in place; every key and shape of its state_dict must match.
        tensors: values by key; cast to the model's dtypes.
        where: the file, for messages.

    Raises:
        ArchitectureError: keys are missing or unexpected, or shapes differ; nothing was loaded.
    """
    own = model.state_dict()
    problems = []
    # Files from before torch 0.4.1 lack BatchNorm's counter, which nothing is computed with; torch fills it in too.
    missing = {k for k in own.keys() - tensors.keys() if not k.endswith("num_batches_tracked")}
    unexpected = tensors.keys() - own.keys()
    if missing:
        problems.append(f"missing from the file: {_patterns(missing)}")
    if unexpected:
        problems.append(f"unknown to the architecture: {_patterns(unexpected)}")
    shapes = [
        f"{key} is {list(tensors[key].shape)} in the file, {list(own[key].shape)} in the architecture"
        for key in own
        if key in tensors and isinstance(own[key], Tensor) and own[key].shape != tensors[key].shape
    ]
    if shapes:
        problems.append(
            "; ".join(shapes[:_LISTED]) + (f" and {len(shapes) - _LISTED} more" * (len(shapes) > _LISTED))
        )
    if problems:
        raise ArchitectureError(f"{where} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict({**own, **tensors})


def _load_file(ref: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ArchitectureError(f"--arch {ref}: no file `{path}`")
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
        raise ArchitectureError(f"--arch {ref}: `{path}` raised {_told(error)}") from error
    return module


def _load_module(ref: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ArchitectureError(f"--arch {ref}: no module `{error.name}`") from error
        raise ArchitectureError(f"--arch {ref}: importing `{name}` raised {_told(error)}") from error


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


def _told(error: Exception) -> str:
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
