"""Transforms by hand and by ONNX Runtime, maps found in exports, and what must not be guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from export_cases import NETWORKS, Exports, random_model, values_of, without_metadata
from onnx import helper, numpy_helper
from support import bits, gaussian
from torch import Tensor, nn

from reparam.onnxfile import transforms
from reparam.onnxfile.mapping import Found, find_map
from reparam.onnxfile.reading import read_initializers
from reparam.onnxfile.weight_map import Source, WeightMap


@dataclass(frozen=True)
class InMemory:
    """An initializer that is a tensor."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def tensor(self) -> Tensor:
        return self.value


def found_in(initializers: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Found:
    return find_map({name: InMemory(value) for name, value in initializers.items()}, state)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


CASES = [("convolutions", None), ("convolutions", "fp16"), ("convolutions", "bf16"), ("sequences", None)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_map_of_one_export_gives_every_weight_of_another(
    name: str, dtype: str | None, exports: Exports
) -> None:
    """Found by the values of one model, it has to hold for the values of every model: bit for bit."""
    _, one = exports(name, 1, dtype)
    path, _ = exports(name, 2, dtype)
    state = random_model(name, 2).state_dict()
    assert (one.found.ambiguous, one.found.unknown) == ({}, ())
    assert {key for key in one.found.uncovered if not key.endswith("num_batches_tracked")} <= {"unused"}
    values = values_of(path)
    for initializer, source in one.found.weights.sources.items():
        value = values[initializer]
        assert "within" not in source.settings
        assert bits(transforms.apply(source, state, value.dtype)) == bits(value), initializer
    unmapped = values.keys() - one.found.weights.sources.keys()
    floats = [k for k in unmapped if values[k].is_floating_point() and values[k].numel() > 1]
    assert not floats


def test_the_exporter_does_what_the_networks_were_made_for(exports: Exports) -> None:
    kinds: dict[str, set[str]] = {}
    for name in NETWORKS:
        sources = exports(name, 1)[1].found.weights.sources.values()
        for source in sources:
            kinds.setdefault(source.transform, set()).update(source.keys)
    assert kinds["batch_norm_weight"] >= {"conv.weight", "depthwise.weight", "up.weight", "fc.weight"}
    assert kinds["batch_norm_bias"] >= {"bn.bias", "depthwise.bias", "up_bn.running_mean", "fc.bias"}
    assert kinds["reshape"] == {"act.weight"}
    assert kinds["transpose"] >= {"block.self_attn.in_proj_weight", "block.linear1.weight", "embed.weight"}
    assert kinds["gates"] >= {"lstm.weight_ih_l0_reverse", "gru.bias_hh_l0"}
    assert kinds["same"] >= {"temperature", "first.weight", "head.weight"}


def test_foreign_names_make_no_difference(exports: Exports, tmp_path: Path) -> None:
    path, done = exports("convolutions", 1)
    foreign = without_metadata(path, tmp_path / "foreign.onnx", rename=True)
    again = find_map(read_initializers(foreign), random_model("convolutions", 1).state_dict())
    assert (again.ambiguous, again.unknown) == ({}, ())

    def told(sources: Mapping[str, Source]) -> list[str]:
        return sorted(str((source.keys, source.transform)) for source in sources.values())

    assert told(again.weights.sources) == told(done.found.weights.sources)


@pytest.mark.parametrize("gates", transforms.GATES)
def test_gates_stand_where_onnx_wants_them(gates: int, tmp_path: Path) -> None:
    """ONNX Runtime's recurrent operators, given what the transform makes, compute what torch's module computes."""
    module = {4: nn.LSTM, 3: nn.GRU, 1: nn.RNN}[gates](3, 5, bidirectional=True)
    state = {key: gaussian(*x.shape, seed=i) for i, (key, x) in enumerate(module.state_dict().items())}
    module.load_state_dict(state)
    order = list(transforms.GATES[gates])
    rows = 5 * gates
    operands = {
        "W": (("weight_ih_l0", "weight_ih_l0_reverse"), [2, rows, 3]),
        "R": (("weight_hh_l0", "weight_hh_l0_reverse"), [2, rows, 5]),
        "B": (("bias_ih_l0", "bias_hh_l0", "bias_ih_l0_reverse", "bias_hh_l0_reverse"), [2, 2 * rows]),
    }
    tensors = [
        numpy_helper.from_array(
            transforms.apply(Source(keys, "gates", {"order": order, "shape": shape}), state).numpy(), name
        )
        for name, (keys, shape) in operands.items()
    ]
    kind = {4: "LSTM", 3: "GRU", 1: "RNN"}[gates]
    extra = {"linear_before_reset": 1} if gates == 3 else {}
    node = helper.make_node(
        kind, ["X", "W", "R", "B"], ["Y"], hidden_size=5, direction="bidirectional", **extra
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("X", 1, [4, 2, 3])], [value("Y", 1, [4, 2, 2, 5])], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = gaussian(4, 2, 3, seed=9)
    ran = torch.from_numpy(session.run(None, {"X": x.numpy()})[0])
    expected = module(x)[0].detach().reshape(4, 2, 2, 5).transpose(1, 2)
    torch.testing.assert_close(ran, expected, rtol=0, atol=1e-6)


def test_a_batch_norm_is_folded_as_torch_computes_it() -> None:
    torch.manual_seed(0)
    layer, norm = nn.ConvTranspose2d(4, 6, 2, groups=2).double(), nn.BatchNorm2d(6).double().eval()
    for i, x in enumerate([*norm.parameters(), norm.running_mean]):
        assert x is not None
        x.data.copy_(gaussian(6, seed=i))
    assert norm.running_var is not None
    norm.running_var.copy_(gaussian(6, seed=7).abs() + 0.1)
    state = {
        **{f"l.{k}": v for k, v in layer.state_dict().items()},
        **{f"n.{k}": v for k, v in norm.state_dict().items()},
    }
    roles = ["weight", "gamma", "running_var"]
    weight = Source(
        ("l.weight", "n.weight", "n.running_var"),
        "batch_norm_weight",
        {"roles": roles, "eps": 1e-5, "axis": 1},
    )
    keys = ("l.bias", "n.running_mean", "n.weight", "n.running_var", "n.bias")
    roles = ["bias", "running_mean", "gamma", "running_var", "beta"]
    bias = Source(keys, "batch_norm_bias", {"roles": roles, "eps": 1e-5})
    x = gaussian(2, 4, 3, 3, dtype=torch.float64)
    folded = nn.functional.conv_transpose2d(
        x, transforms.apply(weight, state), transforms.apply(bias, state), groups=2
    )
    torch.testing.assert_close(folded, norm(layer(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_fold_is_rounded_as_numpy_rounds_it(dtype: type[np.floating[Any]]) -> None:
    """Exporters fold in numpy; torch's own square root is another in the last bit."""
    var, gamma = (gaussian(4096, seed=i).abs().numpy().astype(dtype) for i in (0, 1))
    roles = {"roles": ["weight", "gamma", "running_var"], "eps": 1e-5, "axis": 0}
    state = {"g": torch.from_numpy(gamma), "v": torch.from_numpy(var), "w": torch.ones(4096, 1)}
    found = transforms.apply(
        Source(("w", "g", "v"), "batch_norm_weight", roles), state, torch.from_numpy(var).dtype
    )
    np.testing.assert_array_equal(found.numpy()[:, 0], gamma / np.sqrt(var + 1e-5))


def test_the_sum_and_the_rows() -> None:
    state = {"a": gaussian(6, 2), "b": gaussian(6, 2, seed=1)}
    np.testing.assert_array_equal(
        transforms.apply(Source(("a", "b"), "sum"), state), state["a"].numpy() + state["b"].numpy()
    )
    rows = transforms.apply(Source(("a",), "rows", {"start": 2, "stop": 4, "perm": [1, 0]}), state)
    np.testing.assert_array_equal(rows, state["a"].numpy()[2:4].T)


def test_a_map_survives_json() -> None:
    found = WeightMap(
        {"w": Source(("a", "b"), "gates", {"order": [0], "shape": [1, 2]}), "v": Source(("c",))}
    )
    assert WeightMap.load(found.dump()) == found


def test_a_name_alone_is_never_enough() -> None:
    state = {"fc.weight": gaussian(4, 4), "fc.bias": gaussian(4, seed=1), "scale": torch.tensor(2.0)}
    nearly = state["fc.weight"].clone()
    nearly[2, 3] = torch.nextafter(nearly[2, 3], torch.tensor(9.0))
    found = found_in({"fc.weight": nearly, "fc.bias": -state["fc.bias"], "scale": torch.tensor(1.0)}, state)
    assert found.weights.sources == {}
    assert found.unknown == ("fc.weight", "fc.bias")
    assert found.uncovered == tuple(state)


def test_a_rearrangement_is_told_from_another_weight() -> None:
    """Same fingerprint, other values in place: no match."""
    state = {"w": gaussian(2, 3, 4)}
    shuffled = state["w"].flatten()[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    moved = state["w"].permute(2, 0, 1).contiguous()
    nearly = torch.cat([moved[:1], moved[1:].flip(0)])
    found = found_in({"a": moved, "b": shuffled.reshape(2, 3, 4), "c": nearly}, state)
    assert found.weights.sources == {"a": Source(("w",), "transpose", {"perm": [2, 0, 1]})}
    assert found.unknown == ("b", "c")


def test_equal_values_are_told_apart_by_name_or_not_at_all() -> None:
    state = {"a.bias": torch.zeros(4), "b.bias": torch.zeros(4), "w": gaussian(4)}
    found = found_in({"b.bias": torch.zeros(4), "x": torch.zeros(4), "val_3": gaussian(4)}, state)
    assert found.weights.sources == {"b.bias": Source(("b.bias",)), "val_3": Source(("w",))}
    assert found.ambiguous == {"x": ("a.bias", "b.bias")}


def test_tied_weights_are_one() -> None:
    weight = gaussian(5, 3)
    state = {"embed.weight": weight, "head.weight": weight}
    found = found_in({"val_1": weight.T.contiguous()}, state)
    assert found.weights.sources == {"val_1": Source(("embed.weight",), "transpose", {"perm": [1, 0]})}
    assert (found.ambiguous, found.uncovered) == ({}, ())


def test_numbers_that_everything_equals_need_their_own_name() -> None:
    state = {"steps": torch.tensor(1), "scale": torch.tensor([0.5]), "ids": torch.arange(4)}
    mine = {"steps": torch.tensor(1), "scale": torch.tensor([0.5]), "ids": torch.arange(4)}
    assert found_in(mine, state).weights.sources == {key: Source((key,)) for key in state}
    foreign = {"val_0": torch.tensor(1), "val_1": torch.tensor([0.5]), "val_2": torch.arange(4)}
    found = found_in(foreign, state)
    assert (found.weights.sources, found.ambiguous, found.unknown) == ({}, {}, ())
    assert found_in({"steps": torch.tensor(2)}, {**state, "two": torch.tensor(2)}).weights.sources == {}


def folded_by_hand(eps: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer with a batch norm, and what an exporter that computes in float64 makes of them."""
    state = {"l.weight": gaussian(6, 3, 2), "n.weight": gaussian(6, seed=1), "n.bias": gaussian(6, seed=2)}
    state |= {"n.running_mean": gaussian(6, seed=3), "n.running_var": gaussian(6, seed=4).abs() + 0.1}
    w, gamma, beta, mean, var = (x.double() for x in state.values())
    scale = gamma / (var + eps).sqrt()
    made = {"W": w * scale.reshape(-1, 1, 1), "B": beta - mean * scale}
    return state, {name: value.float() for name, value in made.items()}


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_other_roundings_are_within_the_stated_tolerance(eps: float) -> None:
    state, made = folded_by_hand(eps)
    found = found_in(made, state).weights.sources
    assert {name: source.transform for name, source in found.items()} == {
        "W": "batch_norm_weight",
        "B": "batch_norm_bias",
    }
    for name, source in found.items():
        assert source.settings["eps"] == eps
        apart = (transforms.apply(source, state) - made[name]).abs().max() / made[name].abs().max()
        assert apart <= source.settings.get("within", 0)


def test_a_fold_that_is_off_by_more_is_none() -> None:
    state, made = folded_by_hand(1e-5)
    made["W"][4, 1, 1] *= 1 + 1e-5
    assert found_in(made, state).weights.sources == {}


def test_batch_norms_that_are_equal_are_not_guessed() -> None:
    state, made = folded_by_hand(1e-5)
    state |= {key.replace("n.", "m."): x.clone() for key, x in state.items() if key.startswith("n.")}
    found = found_in(made, state)
    assert found.weights.sources == {}
    assert set(found.ambiguous["W"]) == {"l.weight", "n.weight", "n.running_var", "m.weight", "m.running_var"}


def test_weights_of_another_training_are_not_taken_for_those_of_a_file(shared: Path) -> None:
    """silero's safetensors and the ONNX file beside it have all shapes in common, and one tensor."""
    from safetensors.torch import load_file

    folder = shared / "data" / "checkpoints" / "silero_vad"
    initializers = read_initializers(folder / "silero_vad_16k_op15.onnx")
    state = load_file(folder / "silero_vad_16k.safetensors")
    found = find_map(initializers, state)
    assert found.weights.sources == {"model.stft.forward_basis_buffer": Source(("stft_conv.weight",))}
    ours = {key: InMemory(x) for key, x in state.items() if x.numel() > 1}
    itself = find_map(ours, state)
    assert itself.weights.sources == {key: Source((key,)) for key in ours}
