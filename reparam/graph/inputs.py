"""What a network takes: the input specifications of the command line, and seeded inputs that satisfy them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam.errors import ReparamError

_SHAPE = re.compile(r"[^\[\]=]+")
_TYPED = re.compile(r"(?P<name>\w+)=(?P<dtype>\w+)\[(?P<shape>[^\[\]]*)\]")


@dataclass(frozen=True)
class InputSpec:
    """One input of a network.

    Attributes:
        name: of the input in the exported file.
        axes: extents; a string is a dynamic axis of that name, the same in every input that has it.
    """

    name: str
    axes: tuple[int | str, ...]

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The names of the dynamic axes, each once."""
        return tuple(dict.fromkeys(axis for axis in self.axes if isinstance(axis, str)))

    def sample(self, generator: torch.Generator, sizes: dict[str, int], scale: float = 1.0) -> Tensor:
        """Float32 normal noise of deviation ``scale``; ``sizes`` holds every dynamic axis's extent."""
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in self.axes]
        return torch.randn(shape, generator=generator) * scale


def parse_spec(text: str) -> InputSpec:
    """Read one ``--input``: ``N,3,32,32`` (a letter is a dynamic axis) or ``name=float32[N,3,32,32]``.

    Raises:
        ReparamError: not of that form, an extent below 1, or an element type other than float32.
    """
    typed = _TYPED.fullmatch(text.strip())
    if typed is None and not _SHAPE.fullmatch(text.strip()):
        raise ReparamError(f"--input {text}: expected extents like N,3,32,32 or name=float32[N,3,32,32]")
    name, dtype, shape = typed.group("name", "dtype", "shape") if typed else ("input", "float32", text)
    if dtype != "float32":
        raise ReparamError(f"--input {text}: element type {dtype} is not supported yet, only float32 is")
    axes: list[int | str] = []
    for part in (part.strip() for part in shape.split(",")):
        if part.isdecimal() and int(part) > 0:
            axes.append(int(part))
        elif part.isidentifier():
            axes.append(part)
        else:
            raise ReparamError(
                f"--input {text}: `{part}` is neither an extent of 1 or more nor the name of a dynamic axis"
            )
    return InputSpec(name, tuple(axes))
