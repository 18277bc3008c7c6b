"""Any bytes: a mutated file converts or is refused in one line. Never a traceback, a failed check, a crash or a hang."""

from __future__ import annotations

import io
import json
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from support import assert_one_line, gaussian, records_of, run

BOUNDED = settings(
    derandomize=True,
    deadline=timedelta(seconds=20),  # no hang, whatever else the machine does
    suppress_health_check=[HealthCheck.too_slow],
)
STATE = {
    "conv.weight": gaussian(3, 2, 2), "conv.bias": gaussian(3, seed=1), "fc.weight": gaussian(3, 4, dtype=torch.bfloat16),
    "ids": torch.arange(3),
}  # fmt: skip


def plain_file() -> bytes:
    return save(STATE, {"format": "pt"})


def converted_file(to: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "model.safetensors"
        source.write_bytes(plain_file())
        assert run("convert", source, "--to", to).code == 0
        out = source.with_name(f"model.{to}.safetensors")
        assert records_of(out)
        return out.read_bytes()


def pickled_file(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": STATE}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def index_file() -> bytes:
    metadata = {"total_size": 0}
    return json.dumps(
        {"metadata": metadata, "weight_map": dict.fromkeys(STATE, "model.safetensors")}
    ).encode()


@st.composite
def mutations(draw: st.DrawFn, data: bytes, focus: int) -> bytes:
    """``data`` with a few bytes changed, inserted, removed or swapped, mostly within the first ``focus``; or cut."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([8, focus, focus, len(changed)]))
        at = draw(st.integers(0, max(0, min(end, len(changed)) - 1)))
        kind = draw(st.sampled_from(["byte", "byte", "bit", "digit", "insert", "remove", "copy", "cut"]))
        if not changed:
            break
        if kind == "byte":
            changed[at] = draw(st.integers(0, 255))
        elif kind == "bit":
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "digit":
            changed[at] = draw(st.sampled_from(b'0123456789-.eE"[]{},:\\'))
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del changed[at : at + draw(st.integers(1, 40))]
        elif kind == "copy":
            begin = draw(st.integers(0, len(changed) - 1))
            changed[at:at] = changed[begin : begin + draw(st.integers(1, 60))]
        else:
            del changed[at:]
    return bytes(changed)


def assert_converts_or_refuses(
    name: str, data: bytes, to: str, companions: dict[str, bytes] | None = None
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "in"
        folder.mkdir()
        for other, content in (companions or {}).items():
            (folder / other).write_bytes(content)
        source = folder / name
        source.write_bytes(data)
        out = Path(temporary) / ("out" if name.endswith(".json") else "out.safetensors")
        ran = run("convert", source, "--to", to, "-o", out)
        left = {path.name for path in Path(temporary).iterdir()} - {"in"}
        if ran.code == 0:
            assert left == {out.name}
            assert run("inspect", out, "--stats").code == 0, "what was written can be read"
            return
        assert_one_line(ran)
        assert not left
        looked = run("inspect", source, "--json")
        if looked.code != 0:
            assert_one_line(looked)


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


PLAIN = plain_file()


@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_plain_files(to: str) -> None:
    @settings(BOUNDED, max_examples=50)
    @given(mutations(PLAIN, header_length(PLAIN)))
    def holds(data: bytes) -> None:
        assert_converts_or_refuses("model.safetensors", data, to)

    holds()


@pytest.mark.parametrize("held", ["wn", "gmp"])
def test_converted_files(held: str) -> None:
    """The metadata is ours, and may lie like any other."""
    whole = converted_file(held)

    @settings(BOUNDED, max_examples=50)
    @given(mutations(whole, header_length(whole)))
    def holds(data: bytes) -> None:
        assert_converts_or_refuses("model.safetensors", data, "sp")

    holds()


def test_converted_files_whose_metadata_alone_changed() -> None:
    """The header stays one, so that what it says of the layers is looked at."""
    whole = converted_file("gmp")
    header = json.loads(whole[8 : header_length(whole)])
    text = header["__metadata__"]["reparam"].encode()

    @settings(BOUNDED, max_examples=50)
    @given(mutations(text, len(text)))
    def holds(changed: bytes) -> None:
        value = changed.decode("utf-8", "replace")
        again = json.dumps({**header, "__metadata__": {"reparam": value}}).encode()
        data = len(again).to_bytes(8, "little") + again + whole[header_length(whole) :]
        assert_converts_or_refuses("model.safetensors", data, "sp")

    holds()


# The corners of a floating type's range, as 16 leading bits: zeros, subnormal numbers, ones, the largest, Inf, NaN.
CORNERS = [
    0x0000,
    0x8000,
    0x0001,
    0x0040,
    0x007F,
    0x0080,
    0x3F80,
    0xBF80,
    0x3F81,
    0x1F00,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0x7FC0,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_any_weights(to: str, dtype: torch.dtype) -> None:
    """Every bit pattern is a weight: NaN is refused, the rest comes back within the bars, or is refused by name."""
    heads = st.sampled_from(CORNERS[:10]) | st.sampled_from(CORNERS) | st.integers(0, 0xFFFF)
    tails = st.sampled_from([0, 1, 0xFFFF]) | st.integers(0, 0xFFFF)
    number = st.tuples(tails, heads) if dtype == torch.float32 else st.tuples(heads)

    @settings(BOUNDED, max_examples=50)
    @given(st.lists(number, min_size=6, max_size=6))
    def holds(numbers: list[tuple[int, ...]]) -> None:
        data = b"".join(half.to_bytes(2, "little") for halves in numbers for half in halves)
        values = torch.frombuffer(bytearray(data), dtype=dtype).reshape(2, 3)
        assert_converts_or_refuses("model.safetensors", save({"fc.weight": values}), to)

    holds()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pickles(legacy: bool) -> None:
    whole = pickled_file(legacy)

    @settings(BOUNDED, max_examples=50)
    @given(mutations(whole, len(whole) // 2))
    def holds(data: bytes) -> None:
        assert_converts_or_refuses("model.pt", data, "gmp")

    holds()


def test_indexes() -> None:
    whole = index_file()

    @settings(BOUNDED, max_examples=50)
    @given(mutations(whole, len(whole)))
    def holds(data: bytes) -> None:
        assert_converts_or_refuses(
            "model.safetensors.index.json", data, "gmp", {"model.safetensors": PLAIN, "config.json": b"{}"}
        )

    holds()
