"""What a network takes: the input specifications of the command line, and seeded inputs that satisfy them.

float types     scale · z, z standard normal, rounded to the type
integers        uniform in [0, high), as token ids and indices are
bool            fair coins
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam.errors import ReparamError

#: element types an input may have, as torch and ``--input`` name them
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")
#: Integers are 0 or 1 where nobody knows how many values an input may have.
FEWEST = 2

_SHAPE = re.compile(r"[^\[\]=]+")
_TYPED = re.compile(r"(?P<name>\w+)=(?P<dtype>\w+)\[(?P<shape>[^\[\]]*)\]")


@dataclass(frozen=True)
class InputSpec:
    """One input of a network.

    Attributes:
        name: of the input in the exported file.
        axes: extents; a string is a dynamic axis of that name, the same in every input that has it.
        dtype: one of :data:`DTYPES`.
    """

    name: str
    axes: tuple[int | str, ...]
    dtype: str = "float32"

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The names of the dynamic axes, each once."""
        return tuple(dict.fromkeys(axis for axis in self.axes if isinstance(axis, str)))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of the input's elements."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def is_float(self) -> bool:
        """Whether the input is noise that can be louder or quieter."""
        return self.torch_dtype.is_floating_point

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where every dynamic axis has the extent in ``sizes``."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def sample(
        self,
        generator: torch.Generator,
        sizes: Mapping[str, int],
        scale: float = 1.0,
        high: int | None = None,
    ) -> Tensor:
        """A seeded input.

        Args:
            generator: advanced.
            sizes: the extent of every dynamic axis.
            scale: deviation of noise; integers and bools have none.
            high: integers stay below it; without, they are 0 or 1.
        """
        shape = self.shape(sizes)
        if self.is_float:
            return (torch.randn(shape, generator=generator) * scale).to(self.torch_dtype)
        values = torch.randint(FEWEST if self.dtype == "bool" else high or FEWEST, shape, generator=generator)
        return values.to(self.torch_dtype)


def parse_spec(text: str) -> InputSpec:
    """Read one ``--input``: ``N,3,32,32`` (a letter is a dynamic axis) or ``name=int64[N,T]``.

    Raises:
        ReparamError: not of that form, an extent below 1, or an unknown element type.
    """
    typed = _TYPED.fullmatch(text.strip())
    if typed is None and not _SHAPE.fullmatch(text.strip()):
        raise ReparamError(f"--input {text}: expected extents like N,3,32,32 or name=float32[N,3,32,32]")
    name, dtype, shape = typed.group("name", "dtype", "shape") if typed else ("input", "float32", text)
    if dtype not in DTYPES:
        raise ReparamError(f"--input {text}: element type {dtype} is none of {', '.join(DTYPES)}")
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
    return InputSpec(name, tuple(axes), dtype)
