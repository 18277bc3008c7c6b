"""Options that several commands read alike."""

from __future__ import annotations

from collections.abc import Sequence

from reparam.errors import ReparamError


def parse_arch_args(given: Sequence[str] | None) -> dict[str, str]:
    """``--arch-arg k=v`` as a dictionary.

    Raises:
        ReparamError: one of them is not of that form.
    """
    args = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ReparamError(f"--arch-arg {text}: expected name=value")
        args[key] = value
    return args
