"""Which implementation of the map runs: its device's own, or the reference where that one cannot.

| device | backend | needs |
|---|---|---|
| cuda | triton | the package triton |
| cpu | compiled | the package numba: `reparam[fast]` |
| any other | reference | |

A backend is one module with ``decode`` and ``rows_gradient``, called as the reference's
(:func:`reparam.kernels.hyperspherical.decode`, :func:`reparam.kernels.gradient.rows_gradient`), and ``refusal``, which
says in words why it cannot map given angles, or None. It is imported when a tensor on its device is first mapped.

A conversion maps every weight once, which is seldom worth loading anything: see :func:`compiled_conversion`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from reparam.errors import first_line
from reparam.kernels.gradient import rows_gradient
from reparam.kernels.hyperspherical import decode, encode

# By device: the backend's name and its module.
_OWN = {
    "cuda": ("triton", "reparam.kernels.triton_rows"),
    "cpu": ("compiled", "reparam.kernels.compiled"),
}


@dataclass(frozen=True)
class Backend:
    """One implementation of the map.

    Attributes:
        name: "reference" or a name of the table above.
        decode: see :func:`reparam.kernels.hyperspherical.decode`.
        gradient: see :func:`reparam.kernels.gradient.rows_gradient`.
        encode: see :func:`reparam.kernels.hyperspherical.encode`.
        instead: why the device's own backend does not run, where it has one and this is the reference.
    """

    name: str
    decode: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor]]
    encode: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]] = encode
    instead: str | None = None


REFERENCE = Backend("reference", decode, rows_gradient)
_converting: ContextVar[Backend] = ContextVar("converting", default=REFERENCE)


def choose(theta: Tensor) -> Backend:
    """The backend that maps these angles, by their device, dtype and shape."""
    device = theta.device.type
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        device = "cuda"  # Triton's interpreter runs the device's own code on tensors of the CPU
    if device not in _OWN:
        return REFERENCE
    name, path = _OWN[device]
    module = _imported(path)
    if isinstance(module, str):
        return replace(REFERENCE, instead=f"{name}: {module}")
    reason = module.refusal(theta)
    if reason is not None:
        return replace(REFERENCE, instead=f"{name}: {reason}")
    return Backend(name, module.decode, module.rows_gradient)


def for_conversion() -> Backend:
    """What maps weights and angles once, not at every step: the reference, but within :func:`compiled_conversion`."""
    return _converting.get()


@contextlib.contextmanager
def compiled_conversion() -> Iterator[Backend]:
    """Within, conversions on the CPU run in its own backend, where there is one, and in processes forked meanwhile.

    That takes half a second to begin with, and some seconds when the loops are built for the first time. Gives the backend
    that runs: the reference, with the reason, where there is no other or its loops cannot be built.
    """
    backend = _prepared()
    before = _converting.set(backend)
    try:
        yield backend
    finally:
        _converting.reset(before)


def _prepared() -> Backend:
    name, path = _OWN["cpu"]
    module = _imported(path)
    if isinstance(module, str):
        return replace(REFERENCE, instead=f"{name}: {module}")
    try:
        module.prepare()
    except Exception as error:  # whatever a compiler, or the disk it keeps its work on, raises
        return replace(REFERENCE, instead=f"{name}: {type(error).__name__}: {first_line(error)}")
    return Backend(name, module.decode, module.rows_gradient, module.encode)


def name(theta: Tensor) -> str:
    """What maps these angles, in words: "triton", or "reference (triton: No module named 'triton')"."""
    chosen = choose(theta)
    return chosen.name if chosen.instead is None else f"{chosen.name} ({chosen.instead})"


@functools.cache
def _imported(path: str) -> ModuleType | str:
    """A backend's module, or why there is none here."""
    try:
        return importlib.import_module(path)
    except ImportError as error:
        return str(error)
    except Exception as error:  # a package that is there and broken
        return f"{type(error).__name__}: {first_line(error)}"
