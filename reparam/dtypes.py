"""Element types by their safetensors code: size, whether a weight of that type can be reparameterized, torch's name.

Headers are read without importing torch, so the table holds names and :func:`torch_dtype` looks them up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reparam.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# code -> (bits, torch attribute or None); codes without one can be copied, never converted
_TABLE: dict[str, tuple[int, str | None]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "C64": (64, "complex64"),
}

#: Weights of these types can be decomposed.
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


def is_known(code: str) -> bool:
    return code in _TABLE


def bits(code: str) -> int:
    """Bits of one element of type ``code``."""
    return _TABLE[code][0]


def nbytes(code: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of type ``code`` and ``shape``.

    Raises:
        CheckpointError: a sub-byte type whose elements do not fill whole bytes.
    """
    total = bits(code)
    for extent in shape:
        total *= extent
    if total % 8:
        raise CheckpointError(f"{code} tensor of shape {list(shape)} does not fill whole bytes")
    return total // 8


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of ``code``.

    Raises:
        CheckpointError: torch has no such type.
    """
    import torch

    name = _TABLE[code][1]
    dtype = getattr(torch, name, None) if name else None
    if dtype is None:
        raise CheckpointError(f"this torch has no element type {code}: such tensors can only be copied")
    return dtype  # type: ignore[no-any-return]


def code_of(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype.

    Raises:
        CheckpointError: safetensors has no such type.
    """
    name = str(dtype).removeprefix("torch.")
    for code, (_, known) in _TABLE.items():
        if known == name:
            return code
    raise CheckpointError(f"safetensors has no element type for torch.{name}")
