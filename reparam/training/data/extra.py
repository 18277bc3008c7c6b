"""Pillow and pyarrow, which only some formats need."""

from __future__ import annotations

import importlib
from types import ModuleType

from reparam.errors import DataError


def need(module: str, what: str) -> ModuleType:
    """Import ``module``.

    Args:
        what: cannot be read without it, for the message.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(f"{what} needs {module.split('.')[0]}: pip install 'reparam[data]'") from error
