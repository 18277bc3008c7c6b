"""What messages are made of."""

from __future__ import annotations

import pytest

from reparam.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [("one", "one"), ("one\ntwo", "one"), ("\n  one\n\ntwo", "one"), ("", "OSError"), (" \n", "OSError")],
)
def test_the_first_line_of_an_error_says_something(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line
