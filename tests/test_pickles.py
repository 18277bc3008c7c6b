"""PyTorch's own files: where the state_dict is found, and that every tensor arrives with its own values."""

from __future__ import annotations

import collections
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors.torch import load_file
from support import assert_same_bits, convert, done, gaussian, header_of, refused, run, run_apart, tensors_of
from torch import Tensor, nn

from reparam import load_state_dict

LEGACY = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
formats = pytest.mark.parametrize("options", LEGACY.values(), ids=LEGACY)


def a_state() -> dict[str, Tensor]:
    return {
        "fc.weight": gaussian(5, 6),
        "fc.bias": gaussian(5, seed=1),
        "step": torch.tensor(12),
    }


def there_and_back(source: Path) -> dict[str, Tensor]:
    """A file through GmP to plain safetensors."""
    gmp = source.with_name("made.gmp.safetensors")
    convert(source, "gmp", gmp, "--force", "--theta-dtype", "float64")
    convert(gmp, "sp", source.with_name("made.sp.safetensors"), "--force")
    return tensors_of(source.with_name("made.sp.safetensors"))


NESTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "ordered": collections.OrderedDict,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state, "args": {"lr": 1.0}},
    "ema": lambda state: {"ema": state, "step": 7},
    "ema within": lambda state: {"ema": {"decay": 0.9, "model": state}},
    "state_dict in model": lambda state: {"model": {"state_dict": state}},
    "state_dict and ema": lambda state: {"ema": {k: v + 1 for k, v in state.items()}, "state_dict": state},
    "beside a tensor": lambda state: {"epoch": 3, "state_dict": state, "best_acc1": torch.tensor(76.1)},
    "beside an optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(5, 6)}}, "param_groups": [{"params": [0]}]},
    },
}


@formats
@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_the_state_dict_is_found(
    nest: Callable[[Any], Any], options: dict[str, bool], tmp_path: Path
) -> None:
    torch.save(nest(a_state()), tmp_path / "model.pt", **options)
    assert_same_bits(there_and_back(tmp_path / "model.pt"), a_state())


@formats
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".th"])
def test_names_are_kept(suffix: str, options: dict[str, bool], tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in a_state().items()}
    torch.save({"state_dict": state}, tmp_path / f"model{suffix}", **options)
    found = done("convert", tmp_path / f"model{suffix}", "--to", "gmp", "--json").json
    assert found["output"] == str(tmp_path / "model.gmp.safetensors")
    assert set(tensors_of(tmp_path / "model.gmp.safetensors")) == {
        "module.fc.r", "module.fc.theta", "module.fc.lambda_", "module.step",
    }  # fmt: skip
    assert_same_bits(there_and_back(tmp_path / f"model{suffix}"), state)


def test_what_is_not_a_tensor_is_told(tmp_path: Path) -> None:
    torch.save({**a_state(), "classes": ["cat", "dog"], "rate": 0.5}, tmp_path / "model.pt")
    report = done("convert", tmp_path / "model.pt", "--to", "gmp", "--json").json
    assert any("classes" in note and "rate" in note for note in report["notes"])


def layouts() -> dict[str, Tensor]:
    """Weights in every memory order and storage arrangement a trainer leaves behind."""
    base = gaussian(4, 6, 5, seed=2)
    flat = gaussian(100, seed=3)
    return {
        "a.weight": gaussian(6, 5).t(),
        "b.weight": gaussian(8, 9)[::2, 1:7],
        "c.weight": gaussian(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "d.weight": flat[7:37].view(5, 6),
        "e.weight": flat[30:60].view(5, 6),
        "f.table": base.permute(2, 0, 1),
        "g.expanded": torch.arange(3.0).expand(4, 3),
        "h.empty": torch.empty(0, 3).t(),
        "i.scalar": flat[5],
        "j.complex": torch.complex(gaussian(3), gaussian(3, seed=1))[::2],
        "k.int": torch.arange(24).view(4, 6).t(),
    }


@formats
def test_memory_order_does_not_matter(options: dict[str, bool], tmp_path: Path) -> None:
    state = layouts()
    torch.save(state, tmp_path / "model.pt", **options)
    assert_same_bits(there_and_back(tmp_path / "model.pt"), state)


LAZY: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: torch.complex(gaussian(3), gaussian(3, seed=1)).conj(),
    "negative": lambda: torch.complex(gaussian(2, 3), gaussian(2, 3, seed=1)).conj().imag,
}


@formats
@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
def test_what_torch_resolves_late_arrives_resolved(
    make: Callable[[], Tensor], options: dict[str, bool], tmp_path: Path
) -> None:
    """Conjugation and negation are bits of a tensor: its bytes alone are other numbers."""
    state = {**a_state(), "extra": make()}
    assert state["extra"].is_conj() or state["extra"].is_neg()
    torch.save(state, tmp_path / "model.pt", **options)
    found = there_and_back(tmp_path / "model.pt")
    assert torch.equal(found["extra"], state["extra"].resolve_conj().resolve_neg())


@formats
def test_parameters_are_tensors(options: dict[str, bool], tmp_path: Path) -> None:
    """``dict(model.named_parameters())``: they ask for gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(4, 3, 2))
    torch.save(dict(net.named_parameters()), tmp_path / "model.pt", **options)
    assert_same_bits(there_and_back(tmp_path / "model.pt"), net.state_dict())


def rewritten(source: Path, output: Path, compression: int, **records: Callable[[bytes], bytes]) -> Path:
    """A PyTorch archive with some of its records changed, packed with ``compression``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(output, "w", compression) as new:
        for name in old.namelist():
            change = records.get(name.rpartition("/")[2].replace(".", "_"), bytes)
            new.writestr(name, change(old.read(name)))
    return output


PACKINGS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}


@pytest.mark.parametrize("compression", PACKINGS.values(), ids=PACKINGS)
def test_a_repacked_archive_is_read_right(compression: int, tmp_path: Path) -> None:
    """torch reads what any other zip writer made of it; where tensors lie in it cannot be computed, only looked up."""
    state = {"fc.weight": gaussian(64, 64), "other.weight": gaussian(5, 64, seed=1), "step": torch.arange(9)}
    torch.save(state, tmp_path / "model.pt")
    packed = rewritten(tmp_path / "model.pt", tmp_path / "packed.pt", compression)
    assert_same_bits(torch.load(packed, weights_only=True), state)
    assert_same_bits(there_and_back(packed), state)


def test_the_other_byte_order_is_read_right(tmp_path: Path) -> None:
    state = {"fc.weight": gaussian(5, 6)}
    torch.save(state, tmp_path / "model.pt")

    def swap(data: bytes) -> bytes:
        return struct.pack(f">{len(data) // 4}f", *struct.unpack(f"<{len(data) // 4}f", data))

    swapped = rewritten(
        tmp_path / "model.pt",
        tmp_path / "big.pt",
        zipfile.ZIP_STORED,
        byteorder=lambda _: b"big",
        **{"0": swap},
    )
    assert_same_bits(torch.load(swapped, weights_only=True), state)
    ran = run_apart("convert", swapped, "--to", "gmp", "--theta-dtype", "float64")
    assert ran.code == 0, ran.err
    convert(tmp_path / "big.gmp.safetensors", "sp", tmp_path / "sp.safetensors")
    assert_same_bits(load_file(tmp_path / "sp.safetensors"), state)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    """Its bytes would be somebody else's: torch's own loader refuses it too."""
    torch.save({"fc.weight": gaussian(5, 6), "other": gaussian(100)}, tmp_path / "model.pt")

    def widen(data: bytes) -> bytes:
        assert data.count(b"K\x05K\x06\x86") == 1
        return data.replace(b"K\x05K\x06\x86", b"K\x09K\x06\x86")

    wide = rewritten(tmp_path / "model.pt", tmp_path / "wide.pt", zipfile.ZIP_STORED, data_pkl=widen)
    with pytest.raises(RuntimeError):
        torch.load(wide, weights_only=True)
    refused("convert", wide, "--to", "gmp", naming=("wide.pt",), leaving=tmp_path)


UNSTORABLE: dict[str, Callable[[], Tensor]] = {
    "complex128": lambda: torch.zeros(2, dtype=torch.complex128),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(gaussian(3), 0.1, 0, torch.qint8),
}


@formats
@pytest.mark.parametrize("name", UNSTORABLE)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*quantize.*", "ignore:.*TypedStorage.*")
def test_what_safetensors_cannot_hold_is_named(name: str, options: dict[str, bool], tmp_path: Path) -> None:
    torch.save({**a_state(), "net.odd": UNSTORABLE[name]()}, tmp_path / "model.pt", **options)
    refused("convert", tmp_path / "model.pt", "--to", "gmp", naming=("model.pt", "net.odd"), leaving=tmp_path)


@pytest.mark.parametrize("key", ["__metadata__", "format", "reparam"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_of_a_reserved_name_is_not_lost(key: str, tied: bool, tmp_path: Path) -> None:
    """The header's own names: kept where safetensors can, refused where it cannot, never dropped."""
    state = a_state()
    state[key] = state["step"] if tied else torch.arange(4)
    torch.save(state, tmp_path / "model.pt")
    ran = run("convert", tmp_path / "model.pt", "--to", "gmp", "--theta-dtype", "float64")
    if ran.code == 2:
        assert key in ran.err
        assert ran.err.startswith("error: ")
        return
    assert ran.code == 0, ran.err
    convert(tmp_path / "model.gmp.safetensors", "sp", tmp_path / "model.sp.safetensors")
    assert_same_bits(load_state_dict(tmp_path / "model.sp.safetensors")[0], state)
    assert load_file(tmp_path / "model.sp.safetensors")


def test_a_file_object_is_the_same_file(tmp_path: Path) -> None:
    """torch.save to memory names the archive 'archive'."""
    buffer = io.BytesIO()
    torch.save(a_state(), buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    assert_same_bits(there_and_back(tmp_path / "model.pt"), a_state())
    assert header_of(tmp_path / "made.sp.safetensors")["__metadata__"] == {"format": "pt"}


def test_weights_come_back_in_every_type(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        torch.save({"fc.weight": gaussian(5, 40, dtype=dtype)}, tmp_path / "model.pt")
        found = there_and_back(tmp_path / "model.pt")["fc.weight"]
        oracles.assert_came_back(found, gaussian(5, 40, dtype=dtype), torch.float64)
