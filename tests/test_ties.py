"""Tied tensors stay tied, whatever names they have and wherever they stand; a tie is never worth a value."""

from __future__ import annotations

from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import assert_same_bits, convert, done, gaussian, header_of, records_of, run
from torch import Tensor

from reparam import load_state_dict

State = dict[str, Tensor]


def saved(state: State, path: Path) -> Path:
    """As .pt with shared storage, or as safetensors' own writer would tie them: one kept, the rest in the metadata."""
    if path.suffix == ".pt":
        torch.save(state, path)
        return path
    owners: dict[tuple[int, tuple[int, ...]], str] = {}
    kept, metadata = {}, {"format": "pt"}
    for key, value in state.items():
        owner = owners.setdefault((value.data_ptr(), tuple(value.shape)), key)
        if owner == key:
            kept[key] = value
        else:
            metadata[key] = owner
    save_file(kept, path, metadata)
    return path


def loaded(path: Path) -> State:
    return load_state_dict(path)[0]


def tied_groups(state: State) -> set[frozenset[str]]:
    """Keys that share their memory."""
    groups: dict[int, set[str]] = {}
    for key, value in state.items():
        groups.setdefault(value.data_ptr(), set()).add(key)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def assert_back(source: Path, state: State, to: str, *options: object) -> State:
    """Converts, and converts back to the same values, the same keys and the same ties; gives the converted tensors."""
    out, sp = source.with_name(f"out.{to}.safetensors"), source.with_name("back.safetensors")
    convert(source, to, out, "--theta-dtype", "float64", *options)
    convert(out, "sp", sp)
    back = loaded(sp)
    assert sorted(back) == sorted(state)
    for key, value in state.items():
        oracles.assert_came_back(back[key].reshape(1, -1), value.reshape(1, -1), torch.float64)
        assert torch.equal(back[key], value), key
    assert tied_groups(back) == tied_groups(state)
    return loaded(out)


def embedding_and_head() -> State:
    table = gaussian(12, 8)
    return {
        "model.embed_tokens.weight": table,
        "model.fc.weight": gaussian(6, 8, seed=1),
        "lm_head.weight": table,
    }


suffixes = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
targets = pytest.mark.parametrize("to", ["wn", "gmp"])


@suffixes
@targets
def test_a_tied_head_that_is_skipped_stays_tied(suffix: str, to: str, tmp_path: Path) -> None:
    state = embedding_and_head()
    out = assert_back(saved(state, tmp_path / f"model{suffix}"), state, to)
    assert out["lm_head.weight"].data_ptr() == out["model.embed_tokens.weight"].data_ptr()


@suffixes
@targets
def test_a_tied_pair_converts_together(suffix: str, to: str, tmp_path: Path) -> None:
    state = embedding_and_head()
    out = assert_back(saved(state, tmp_path / f"model{suffix}"), state, to, "--include", "*")
    v = "theta" if to == "gmp" else "weight_v"
    assert out[f"lm_head.{v}"].data_ptr() == out[f"model.embed_tokens.{v}"].data_ptr()
    size = (tmp_path / f"out.{to}.safetensors").stat().st_size
    # one table, not two: 8 bytes an angle, 4 a weight
    assert size < (12 * 8 + 6 * 8) * (8 if to == "gmp" else 4) + 12 * 8 * 4 + 2500


@suffixes
@targets
def test_one_of_a_pair_is_not_converted_alone(suffix: str, to: str, tmp_path: Path) -> None:
    source = saved(embedding_and_head(), tmp_path / f"model{suffix}")
    report = done(
        "convert", source, "--to", to, "--include", "lm_head", "--include", "model.fc", "--json"
    ).json
    skipped = {layer["name"]: layer["reason"] for layer in report["layers"] if layer["status"] == "skipped"}
    assert set(skipped) == {"lm_head", "model.embed_tokens"}
    assert "tied" in skipped["lm_head"]
    assert run("convert", source, "--to", to, "--include", "lm_head", "--dry-run").code == 2


@suffixes
@targets
def test_a_tie_of_three_with_biases_of_their_own(suffix: str, to: str, tmp_path: Path) -> None:
    shared = gaussian(6, 6)
    state: State = {}
    for i, name in enumerate(("a", "b", "c")):
        state |= {f"{name}.weight": shared, f"{name}.bias": gaussian(6, seed=i)}
    state["b.bias"] = state["b.bias"] * 0 + 2.0**30  # no usable λ: this one keeps its bias
    out = assert_back(saved(state, tmp_path / f"model{suffix}"), state, to)
    if to == "gmp":
        assert {"a.lambda_", "b.bias", "c.lambda_"} <= set(out)


@suffixes
@targets
def test_a_weight_tied_to_what_is_no_layer(suffix: str, to: str, tmp_path: Path) -> None:
    """The other name is read by code of the model's own: its value has to stay."""
    shared = gaussian(6, 8)
    state = {"fc.weight": shared, "table": shared, "other.weight": gaussian(4, 8, seed=1)}
    source = saved(state, tmp_path / f"model{suffix}")
    convert(source, to, tmp_path / "out.safetensors")
    assert torch.equal(loaded(tmp_path / "out.safetensors")["table"], shared)


@suffixes
@targets
def test_biases_tied_to_what_is_not_converted(suffix: str, to: str, tmp_path: Path) -> None:
    """As BERT has it: cls.predictions.bias is cls.predictions.decoder.bias."""
    bias = gaussian(6, seed=1)
    orders = (
        {"decoder.bias": bias, "predictions.bias": bias},
        {"predictions.bias": bias, "decoder.bias": bias},
    )
    for i, biases in enumerate(orders):
        state = {"decoder.weight": gaussian(6, 8), **biases}
        folder = tmp_path / str(i)
        folder.mkdir()
        convert(
            saved(state, folder / f"model{suffix}"),
            to,
            folder / "out.safetensors",
            "--theta-dtype",
            "float64",
        )
        assert torch.equal(loaded(folder / "out.safetensors")["predictions.bias"], bias)
        convert(folder / "out.safetensors", "sp", folder / "sp.safetensors")
        assert torch.equal(loaded(folder / "sp.safetensors")["decoder.bias"], bias)


@suffixes
@targets
def test_tied_biases_of_two_layers(suffix: str, to: str, tmp_path: Path) -> None:
    bias = gaussian(6, seed=1)
    state = {"a.weight": gaussian(6, 8), "a.bias": bias, "b.weight": gaussian(6, 8, seed=2), "b.bias": bias}
    source = saved(state, tmp_path / f"model{suffix}")
    for i, options in enumerate(([], ["--exclude", "a"], ["--exclude", "b"])):
        out, sp = tmp_path / f"{i}.safetensors", tmp_path / f"{i}.sp.safetensors"
        convert(source, to, out, "--theta-dtype", "float64", *options)
        convert(out, "sp", sp)
        back = loaded(sp)
        assert sorted(back) == sorted(state)
        for key, value in state.items():
            assert torch.equal(back[key], value), (options, key)


@suffixes
@pytest.mark.parametrize("to", ["gmp"])
def test_an_autoencoder_s_transposed_twin(suffix: str, to: str, tmp_path: Path) -> None:
    """encoder(x) = Wx + b, decoder(h) = Wᵀh + c: one matrix, whose units are rows for one and columns for the other."""
    weight = gaussian(4, 9)
    state = {
        "encoder.weight": weight, "encoder.bias": gaussian(4, seed=1),
        "decoder.weight": weight, "decoder.bias": gaussian(9, seed=2),
    }  # fmt: skip
    source = saved(state, tmp_path / f"model{suffix}")
    convert(source, to, tmp_path / "out.safetensors", "--theta-dtype", "float64")
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    assert_same_bits(loaded(tmp_path / "sp.safetensors"), state)


def test_an_axis_named_for_one_of_a_pair(tmp_path: Path) -> None:
    """A square matrix of two readings: whatever is decided, both come back."""
    weight = gaussian(6, 6)
    state = {f"{name}.weight": weight for name in ("a", "b")} | {
        "a.bias": gaussian(6),
        "b.bias": gaussian(6, seed=1),
    }
    source = saved(state, tmp_path / "model.pt")
    ran = run("convert", source, "--to", "gmp", "--axis", "b=1", "--theta-dtype", "float64")
    if ran.code == 2:
        assert "axis" in ran.err
        return
    assert ran.code == 0, ran.err
    convert(tmp_path / "model.gmp.safetensors", "sp", tmp_path / "sp.safetensors")
    assert_same_bits(loaded(tmp_path / "sp.safetensors"), state)


def test_a_tied_tensor_s_new_name_is_taken(tmp_path: Path) -> None:
    weight = gaussian(6, 8)
    state = {"a.weight": weight, "b.weight": weight, "b.theta": gaussian(3)}
    ran = run("convert", saved(state, tmp_path / "model.pt"), "--to", "gmp")
    assert ran.code == 2
    assert "b.theta" in ran.err
    assert "collides" in ran.err


@targets
def test_the_tie_is_in_the_metadata_as_safetensors_has_it(to: str, tmp_path: Path) -> None:
    """Other readers see one tensor, and which key stands for which."""
    source = saved(embedding_and_head(), tmp_path / "model.pt")
    out = tmp_path / "out.safetensors"
    convert(source, to, out, "--include", "*")
    metadata, kept = header_of(out)["__metadata__"], load_file(out)
    roles = ("r", "theta") if to == "gmp" else ("weight_g", "weight_v")
    for role in roles:
        assert metadata[f"lm_head.{role}"] == f"model.embed_tokens.{role}"
        assert f"lm_head.{role}" not in kept
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(records_of(out))


def test_a_tensor_named_like_a_metadata_value_is_not_a_tie(tmp_path: Path) -> None:
    """``format: pt`` beside a tensor called pt."""
    state = {"fc.weight": gaussian(3, 4), "pt": torch.arange(3)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")
    assert header_of(tmp_path / "out.safetensors")["__metadata__"]["format"] == "pt"
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    assert sorted(loaded(tmp_path / "sp.safetensors")) == ["fc.weight", "pt"]
