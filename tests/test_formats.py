"""safetensors files as they are written and read: anybody's reader agrees, what is not converted keeps every byte."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import oracles
import pytest
import torch
from mpmath import mp
from safetensors.torch import load_file, save_file
from support import (
    assert_same_bits,
    bits,
    convert,
    done,
    entry,
    gaussian,
    header_of,
    raw_file,
    raw_tensors,
    records_of,
    tensors_of,
)
from torch import Tensor

from reparam import load_state_dict, save_state_dict

# A model of one layer, its zeros included: rows (1, 0, -2, 0) and (0, 0, 0, -0.5), biases 0.5 and -0.25, and a norm.
GOLDEN_HEADER = (
    '{"__metadata__":{"format":"pt","reparam":"{\\"layers\\":{\\"fc.weight\\":{\\"axis\\":0,\\"bias\\":\\"lambda_\\",'
    '\\"bias_dtype\\":\\"F32\\",\\"bias_shape\\":[2],\\"dtype\\":\\"F32\\",\\"fan_in\\":4,\\"groups\\":1,'
    '\\"kind\\":\\"gmp\\",\\"shape\\":[2,4],\\"stored\\":\\"F32\\",\\"theta_origin\\":\\"equator\\"}},'
    '\\"version\\":1}"},"fc.lambda_":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"fc.r":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},'
    '"fc.theta":{"dtype":"F32","shape":[2,3],"data_offsets":[16,40]},'
    '"norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[40,44]}}'
)
GOLDEN_DATA = bytes.fromhex(
    "2ef9643e 000000bf"  # lambda_: 0.5/√5, -0.25/0.5
    "bd1b0f40 0000003f"  # r: √5, 0.5
    "3863ed3e 00000000 db0fc9bf"  # theta: atan(1/2), 0, -π/2
    "00000000 00000000 db0f4940"  # 0, 0, π
    "0000803f"  # norm.weight
)


def golden() -> bytes:
    text = GOLDEN_HEADER.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + GOLDEN_DATA


def golden_model() -> dict[str, Tensor]:
    return {
        "fc.weight": torch.tensor([[1.0, 0.0, -2.0, 0.0], [0.0, 0.0, 0.0, -0.5]]),
        "fc.bias": torch.tensor([0.5, -0.25]),
        "norm.weight": torch.ones(1),
    }


def test_golden_bytes_are_written(tmp_path: Path) -> None:
    save_file(golden_model(), tmp_path / "model.safetensors", {"format": "pt"})
    done("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert (tmp_path / "model.gmp.safetensors").read_bytes() == golden()


def test_golden_bytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.gmp.safetensors").write_bytes(golden())
    done("convert", tmp_path / "model.gmp.safetensors", "--to", "sp")
    assert_same_bits(load_file(tmp_path / "model.sp.safetensors"), golden_model())


def test_golden_bytes_are_the_mathematics() -> None:
    r, theta = [math.sqrt(5), 0.5], []
    for row in golden_model()["fc.weight"].tolist():
        theta += [float(t) for t in oracles.exact_angles(row)]
    numbers = [0.5 / math.sqrt(5), -0.5, *r, *theta, 1.0]
    assert struct.pack(f"<{len(numbers)}f", *numbers) == GOLDEN_DATA
    right, straight = struct.pack("<f", -math.pi / 2), struct.pack("<f", math.pi)
    assert GOLDEN_DATA[24:28] == right
    assert GOLDEN_DATA[36:40] == straight


def many_types() -> dict[str, Tensor]:
    """A layer in each floating type beside tensors of every other type, odd sizes first in name."""
    number = torch.arange(5)
    state = {f"{name}.weight": gaussian(3, 5, seed=1, dtype=getattr(torch, name)) for name in ("float64", "float32", "float16", "bfloat16")}  # fmt: skip
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):
        state[f"a.{name}"] = torch.arange(7, dtype=torch.uint8).view(getattr(torch, name))
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        state[f"b.{name}"] = number.to(getattr(torch, name))
    state["a.bool"] = number > 2
    state["a.complex"] = torch.complex(gaussian(3, seed=2), gaussian(3, seed=3))
    state["a.nan"] = torch.tensor([math.nan, -math.inf, -0.0])
    state["c.scalar"] = torch.tensor(2.5)
    state["c.empty"] = torch.empty(0, 3)
    state["c.empty_linear.weight"] = torch.empty(4, 0)
    return state


@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_written_files_are_anybodys(to: str, tmp_path: Path) -> None:
    state = many_types()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt", "author": "somebody"})
    report = convert(tmp_path / "model.safetensors", to, tmp_path / "out.safetensors")
    found, ours = tensors_of(tmp_path / "out.safetensors"), load_state_dict(tmp_path / "out.safetensors")[0]
    assert_same_bits(ours, found)
    kept = {key: value for key, value in state.items() if key not in records_of(tmp_path / "out.safetensors")}
    assert len(state) - len(kept) == 4
    assert_same_bits({key: found[key] for key in kept}, kept)
    assert header_of(tmp_path / "out.safetensors")["__metadata__"]["author"] == "somebody"
    named = {other["name"] for other in report["others"]} | {
        layer["name"] + ".weight" for layer in report["layers"]
    }
    assert named == set(state)
    assert all(other["reason"] for other in report["others"])


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    save_file(many_types(), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors", "--theta-dtype", "float64")
    data, header = (tmp_path / "out.safetensors").read_bytes(), header_of(tmp_path / "out.safetensors")
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    header.pop("__metadata__")
    tensors, ends = tensors_of(tmp_path / "out.safetensors"), [0]
    for key, value in header.items():
        begin, end = value["data_offsets"]
        assert (start + begin) % tensors[key].element_size() == 0, key
        assert begin == ends[-1], "no gaps"
        ends.append(end)
    assert start + ends[-1] == len(data)


def test_types_torch_has_no_name_for_are_copied(tmp_path: Path) -> None:
    packed = bytes(range(6))
    data = gaussian(2, 3).numpy().tobytes()
    header = {
        "fc.weight": entry("F32", [2, 3], 0, 24),
        "fp6": entry("F6_E2M3", [4, 2], 24, 30),
        "fp4": entry("F4", [3, 4], 30, 36),
    }
    source = raw_file(tmp_path / "model.safetensors", header, data + packed + packed[::-1])
    out = tmp_path / "out.safetensors"
    convert(source, "gmp", out)
    found = raw_tensors(out)
    assert found["fp6"] == ("F6_E2M3", [4, 2], packed)
    assert found["fp4"] == ("F4", [3, 4], packed[::-1])


STORED = {"float32": "F32", "float64": "F64"}


@pytest.mark.parametrize("theta_dtype", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_theta_dtype(dtype: torch.dtype, theta_dtype: str, tmp_path: Path) -> None:
    """g, r, theta and lambda_ are of one type; float64 gives float32 weights back bit for bit."""
    state = {"fc.weight": gaussian(6, 40, dtype=dtype), "fc.bias": gaussian(6, seed=1, dtype=dtype)}
    save_file(state, tmp_path / "model.safetensors")
    for to, derived in (("wn", ("weight_g",)), ("gmp", ("r", "theta", "lambda_"))):
        out = tmp_path / f"{to}.safetensors"
        report = convert(tmp_path / "model.safetensors", to, out, "--theta-dtype", theta_dtype)
        found = raw_tensors(out)
        assert {found[f"fc.{role}"][0] for role in derived} == {STORED[theta_dtype]}
        record = records_of(out)["fc.weight"]
        assert record["stored"] == STORED[theta_dtype]
        assert record.get("theta_origin") == ("equator" if to == "gmp" else None)
        convert(out, "sp", tmp_path / f"{to}.sp.safetensors")
        again = load_file(tmp_path / f"{to}.sp.safetensors")
        if dtype == torch.float64:
            continue
        oracles.assert_came_back(again["fc.weight"], state["fc.weight"], getattr(torch, theta_dtype))
        if theta_dtype == "float64" or dtype != torch.float32:
            assert_same_bits(again, state)
            assert report["roundtrip"]["inexact"] == report["roundtrip"]["bias_inexact"] == 0


def test_float64_weights_have_float64_angles_unasked(tmp_path: Path) -> None:
    state = {"fc.weight": gaussian(6, 40).double() / 3, "fc.bias": gaussian(6, seed=1).double() / 3}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "gmp.safetensors")
    convert(tmp_path / "gmp.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")
    oracles.assert_came_back(again["fc.weight"], state["fc.weight"], torch.float64)
    torch.testing.assert_close(again["fc.bias"], state["fc.bias"], rtol=oracles.FLOAT64, atol=0)


def gmp_file(path: Path, **changes: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A small model, and its GmP file's tensors; ``changes`` go into the layer's record."""
    state = {"fc.weight": gaussian(5, 6, seed=4), "fc.bias": gaussian(5, seed=5)}
    save_file(state, path)
    gmp = path.with_name("made.safetensors")
    convert(path, "gmp", gmp)
    record = {**records_of(gmp)["fc.weight"], **changes}
    tensors = load_file(gmp)
    metadata = {"reparam": json.dumps({"version": 1, "layers": {"fc.weight": record}})}
    save_file(tensors, gmp, metadata)
    return state, tensors


def test_the_paper_s_name_of_lambda_is_read(tmp_path: Path) -> None:
    state, tensors = gmp_file(tmp_path / "model.safetensors")
    metadata = header_of(tmp_path / "made.safetensors")["__metadata__"]
    tensors["fc.lambda"] = tensors.pop("fc.lambda_")
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    convert(tmp_path / "other.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")
    assert sorted(again) == sorted(state)
    oracles.assert_came_back(again["fc.weight"], state["fc.weight"], torch.float32)
    torch.testing.assert_close(again["fc.bias"], state["fc.bias"], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_angles_from_the_pole_are_read(dtype: str, tmp_path: Path) -> None:
    """As the paper's code would store them, exact zeros and a negative last coordinate among them."""
    state, _ = gmp_file(tmp_path / "model.safetensors")
    weight = state["fc.weight"]
    weight[0, 2:] = 0
    weight[1, :] = 0
    weight[1, 1] = -2
    torch_dtype = torch.float32 if dtype == "F32" else torch.float64
    theta = torch.tensor(
        [[float(mp.pi / 2 - t) for t in oracles.exact_angles(row)] for row in weight.tolist()],
        dtype=torch.float64,
    )
    radius = weight.double().norm(dim=1)
    record = {
        "kind": "gmp", "shape": [5, 6], "dtype": "F32", "axis": 0, "groups": 1, "fan_in": 6, "stored": dtype,
        "theta_origin": "pole", "bias": "lambda_", "bias_shape": [5], "bias_dtype": "F32",
    }  # fmt: skip
    tensors = {"fc.r": radius.to(torch_dtype), "fc.theta": theta.to(torch_dtype)}
    tensors["fc.lambda_"] = (state["fc.bias"] / radius).to(torch_dtype)
    metadata = {"reparam": json.dumps({"version": 1, "layers": {"fc.weight": record}})}
    save_file(tensors, tmp_path / "pole.safetensors", metadata)
    convert(tmp_path / "pole.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")["fc.weight"]
    assert torch.equal(again == 0, weight == 0)
    assert float(oracles.row_errors(again, weight).max()) <= 5e-7
    convert(tmp_path / "pole.safetensors", "wn", tmp_path / "wn.safetensors")
    assert "fc.weight_v" in load_file(tmp_path / "wn.safetensors")


def test_library_calls_write_what_the_commands_read(tmp_path: Path) -> None:
    state, _ = gmp_file(tmp_path / "model.safetensors")
    tensors, records = load_state_dict(tmp_path / "made.safetensors")
    save_state_dict(tensors, records, tmp_path / "again.safetensors")
    convert(tmp_path / "again.safetensors", "sp", tmp_path / "sp.safetensors")
    oracles.assert_came_back(
        load_file(tmp_path / "sp.safetensors")["fc.weight"], state["fc.weight"], torch.float32
    )
    assert bits(load_file(tmp_path / "again.safetensors")["fc.theta"]) == bits(tensors["fc.theta"])
