"""Every kind of layer in a file: its tensors are found together, named by the contract, and their units guessed openly."""

from __future__ import annotations

from pathlib import Path

import oracles
import pytest
import torch
from layer_kinds import KINDS, Kind, rows_by_loops
from safetensors.torch import load_file, save_file
from support import convert, done, gaussian, records_of
from torch import Tensor, nn

#: key of the bias beside each weight; none for a projected LSTM's projection
BIASES = {
    "fc.weight": "fc.bias",
    "c.weight": "c.bias",
    "u.weight": "u.bias",
    "h.c_attn.weight": "h.c_attn.bias",
    "rnn.weight_ih_l0": "rnn.bias_ih_l0",
    "gru.weight_hh_l0": "gru.bias_hh_l0",
    "lstm.weight_ih_l1_reverse": "lstm.bias_ih_l1_reverse",
    "attn.in_proj_weight": "attn.in_proj_bias",
    "mlp.experts.up": "mlp.experts.up_bias",
    "mlp.experts.down": "mlp.experts.down_bias",
}
#: whose shapes fit another reading as well, so that axis 0 is assumed and told; any reading converts back
AMBIGUOUS = {"conv transpose 2d, grouped", "conv2d, grouped"}


def file_of(kind: Kind, folder: Path) -> dict[str, Tensor]:
    weight, bias = kind.tensors(torch.float32)
    state = {kind.key: weight}
    if bias is not None:
        state[BIASES[kind.key]] = bias
    save_file(state, folder / "model.safetensors")
    return state


@pytest.mark.parametrize("name", KINDS)
def test_gmp_names(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    state = file_of(kind, tmp_path)
    report = convert(tmp_path / "model.safetensors", "gmp", tmp_path / "gmp.safetensors")
    layer, _, param = kind.key.rpartition(".")
    base = layer if param == "weight" else kind.key
    expected = {f"{base}.r", f"{base}.theta"} | ({f"{base}.lambda_"} if kind.bias else set())
    found = load_file(tmp_path / "gmp.safetensors")
    assert set(found) == expected
    record = records_of(tmp_path / "gmp.safetensors")[kind.key]
    (told,) = report["layers"]
    rows = rows_by_loops(state[kind.key], record["axis"], record["groups"])
    assert torch.equal(found[f"{base}.r"], rows.double().norm(dim=1).float())
    assert (record["fan_in"], found[f"{base}.theta"].shape) == (
        rows.shape[1],
        (len(rows), max(rows.shape[1] - 1, 1)),
    )
    assert ("axis" in told) == (name in AMBIGUOUS)
    if name not in AMBIGUOUS:
        assert torch.equal(rows, rows_by_loops(state[kind.key], kind.axis, kind.groups))
    convert(tmp_path / "gmp.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")
    assert sorted(again) == sorted(state)
    back = rows_by_loops(again[kind.key], record["axis"], record["groups"])
    oracles.assert_came_back(back, rows, torch.float32)
    for key in set(state) - {kind.key}:
        torch.testing.assert_close(again[key], state[key], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_weight_norm_names(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    state = file_of(kind, tmp_path)
    convert(tmp_path / "model.safetensors", "wn", tmp_path / "wn.safetensors")
    found = load_file(tmp_path / "wn.safetensors")
    assert set(found) == (set(state) - {kind.key}) | {f"{kind.key}_g", f"{kind.key}_v"}
    assert found[f"{kind.key}_g"].shape == (kind.shape[0],) + (1,) * (len(kind.shape) - 1)
    convert(tmp_path / "wn.safetensors", "gmp", tmp_path / "gmp.safetensors")
    convert(tmp_path / "gmp.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")
    error = (again[kind.key] - state[kind.key]).double().norm() / state[kind.key].double().norm()
    assert float(error) <= oracles.FLOAT32_ROW


@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_whole_recurrent_and_attention_modules(to: str, tmp_path: Path) -> None:
    """As torch names their parameters: nothing is left over, and they load strict when they come back."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(5, 8, num_layers=2, bidirectional=True, proj_size=3),
            "gru": nn.GRUCell(4, 6),
            "rnn": nn.RNN(4, 6, bias=False),
            "attn": nn.MultiheadAttention(8, 2),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        }
    )
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    options = ["--theta-dtype", "float64"]
    report = convert(tmp_path / "model.safetensors", to, tmp_path / "out.safetensors", *options)
    assert {layer["status"] for layer in report["layers"]} == {"converted"}
    weights = {key for key, value in net.state_dict().items() if value.dim() > 1}
    assert set(records_of(tmp_path / "out.safetensors")) == weights
    left = {other["name"] for other in report["others"]}
    assert left == {"cross.in_proj_bias"}, "three matrices share it"
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    again = load_file(tmp_path / "sp.safetensors")
    net.load_state_dict(again, strict=True)
    table = done("inspect", tmp_path / "out.safetensors").out
    assert "lstm.weight_hr_l1_reverse" in table
    assert "attn.in_proj_weight" in table


def test_what_only_looks_like_a_layer_is_copied(tmp_path: Path) -> None:
    """Scales, tables and quantized stacks have names of their own."""
    state = {
        "norm.weight": gaussian(4), "pos_embed": gaussian(1, 5, 4), "relative": gaussian(5, 4), "fc.weight": gaussian(4, 4),
        "mlp.experts.up_scales": gaussian(2, 3, 4), "mlp.experts.up_blocks": torch.ones(2, 3, 4, dtype=torch.uint8),
        "fc.weight_scale": gaussian(4, 4), "empty.weight": torch.empty(0, 4), "int.weight": torch.ones(3, 3, dtype=torch.int8),
    }  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")
    assert [layer["name"] for layer in report["layers"]] == ["fc"]
    assert {other["name"] for other in report["others"]} == set(state) - {"fc.weight"}
    assert all(other["reason"] for other in report["others"])
