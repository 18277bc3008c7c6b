"""Sharded sets and Hugging Face folders: everything goes along, the index is right, layers may span shards."""

from __future__ import annotations

import json
from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    assert_same_bits,
    bits,
    convert,
    done,
    gaussian,
    header_of,
    records_of,
    snapshot,
    tensors_of,
    working_in,
)
from torch import Tensor

from reparam import load_state_dict

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def a_model(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Twelve tensors: a bias stands in another shard than its weight, the head is tied in one metadata."""
    state = {"model.embed_tokens.weight": gaussian(20, 8, dtype=dtype)}
    for i in range(2):
        state |= {
            f"model.layers.{i}.attn.q_proj.weight": gaussian(8, 8, seed=i, dtype=dtype),
            f"model.layers.{i}.attn.q_proj.bias": gaussian(8, seed=10 + i, dtype=dtype),
            f"model.layers.{i}.mlp.up.weight": gaussian(16, 8, seed=20 + i, dtype=dtype),
            f"model.layers.{i}.norm.weight": gaussian(8, seed=30 + i, dtype=dtype),
        }
    state["model.rope"] = torch.arange(5)
    return state


def a_folder(
    folder: Path, shards: int = 3, names: str = "model-{:05}-of-{:05}.safetensors"
) -> dict[str, Tensor]:
    """An HF folder with its companions; tensors are dealt to shards in turn, so that layers span them."""
    folder.mkdir()
    state = a_model()
    weight_map = {}
    for i in range(shards):
        part = {key: state[key] for j, key in enumerate(state) if j % shards == i}
        name = names.format(i + 1, shards)
        (folder / name).parent.mkdir(exist_ok=True)
        tie = {"lm_head.weight": "model.embed_tokens.weight"} if "model.embed_tokens.weight" in part else {}
        save_file(part, folder / name, {"format": "pt", **tie})
        weight_map |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total, "producer": "a trainer"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"vocab": ["ä"]}')
    (folder / "assets").mkdir()
    (folder / "assets" / "merges.txt").write_text("a b\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, unconverted")
    (folder / "model.onnx").write_bytes(b"the same weights, unconverted")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return state


def assert_index_is_right(folder: Path) -> None:
    """total_size and weight_map against what is in the files."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {file.relative_to(folder).as_posix(): tensors_of(file) for file in folder.rglob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, tensors in found.items() for key in tensors}
    sizes = [t.numel() * t.element_size() for tensors in found.values() for t in tensors.values()]
    assert index["metadata"] == {"total_size": sum(sizes), "producer": "a trainer"}


@pytest.mark.parametrize("to", ["wn", "gmp"])
@pytest.mark.parametrize("by", ["folder", "index"])
def test_a_sharded_set_goes_there_and_back(by: str, to: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    state = a_folder(source)
    before = snapshot(source)
    path = source if by == "folder" else source / "model.safetensors.index.json"
    report = done("convert", path, "--to", to, "--json").json
    assert report["output"] == str(tmp_path / f"model-{to}")
    out = tmp_path / f"model-{to}"
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == sorted(
        ["assets/merges.txt", "config.json", "tokenizer.json", "model.safetensors.index.json"]
        + [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    )
    for name in ("assets/merges.txt", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert_index_is_right(out)
    done("convert", out, "--to", "sp", "-o", tmp_path / "back")
    assert_index_is_right(tmp_path / "back")
    back = load_state_dict(tmp_path / "back")[0]
    assert back["lm_head.weight"].data_ptr() == back["model.embed_tokens.weight"].data_ptr()
    del back["lm_head.weight"]
    assert_same_bits(back, state)
    assert snapshot(source) == before


def test_a_layer_is_written_where_its_weight_was(tmp_path: Path) -> None:
    """With its bias, whose shard then holds one tensor less."""
    a_folder(tmp_path / "model")
    convert(tmp_path / "model", "gmp", tmp_path / "out")
    for source, out in (
        (tmp_path / "model" / f"model-0000{i}-of-00003.safetensors", tmp_path / "out" / f"model-0000{i}-of-00003.safetensors")
        for i in (1, 2, 3)
    ):  # fmt: skip
        layers = {
            key.removesuffix(".weight")
            for key in load_file(source)
            if "proj.weight" in key or "up.weight" in key
        }
        found = set(load_file(out))
        for layer in layers:
            assert {f"{layer}.r", f"{layer}.theta"} <= found
            assert ("q_proj" in layer) == (f"{layer}.lambda_" in found)
        recorded = records_of(out) if "reparam" in header_of(out).get("__metadata__", {}) else {}
        assert {key.removesuffix(".weight") for key in recorded} == layers


def test_shards_in_a_folder_below(tmp_path: Path) -> None:
    state = a_folder(tmp_path / "model", names="shards/part-{}-of-{}.safetensors")
    convert(tmp_path / "model", "gmp", tmp_path / "out")
    assert_index_is_right(tmp_path / "out")
    convert(tmp_path / "out", "sp", tmp_path / "back")
    back = load_state_dict(tmp_path / "back")[0]
    del back["lm_head.weight"]
    assert_same_bits(back, state)


def test_a_folder_of_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(a_model(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    done("convert", folder, "--to", "wn")
    assert sorted(p.name for p in (tmp_path / "model-wn").iterdir()) == ["config.json", "model.safetensors"]
    done("convert", tmp_path / "model-wn", "--to", "gmp")
    assert sorted(p.name for p in (tmp_path / "model-gmp").iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_of_one_pickle(tmp_path: Path) -> None:
    """As transformers wrote them before safetensors."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(a_model(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    done("convert", folder, "--to", "gmp")
    assert sorted(p.name for p in (tmp_path / "model-gmp").iterdir()) == ["config.json", "model.safetensors"]
    convert(tmp_path / "model-gmp", "sp", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back" / "model.safetensors"), a_model())


def test_the_working_folder_and_links_have_names_too(tmp_path: Path) -> None:
    """``.`` is called what the folder is called; a link's output stands beside the link, under the link's name."""
    folder = tmp_path / "model"
    a_folder(folder)
    with working_in(folder):
        report = done("convert", ".", "--to", "gmp", "--json").json
    assert Path(report["output"]).resolve() == (tmp_path / "model-gmp").resolve()

    blobs, snapshots = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshots.mkdir()
    save_file(a_model(), blobs / "8f1c0de")
    (snapshots / "model.safetensors").symlink_to(Path("..") / "blobs" / "8f1c0de")
    done("convert", snapshots / "model.safetensors", "--to", "gmp")
    assert sorted(p.name for p in snapshots.iterdir()) == ["model.gmp.safetensors", "model.safetensors"]
    assert [p.name for p in blobs.iterdir()] == ["8f1c0de"]


def test_a_folder_of_links_is_copied_as_files(tmp_path: Path) -> None:
    """The hub's cache: what comes out must not depend on it."""
    a_folder(tmp_path / "blobs")
    links = tmp_path / "links"
    links.mkdir()
    for entry in (tmp_path / "blobs").iterdir():
        (links / entry.name).symlink_to(entry)
    done("convert", links, "--to", "gmp")
    out = tmp_path / "links-gmp"
    assert (out / "config.json").read_bytes() == (tmp_path / "blobs" / "config.json").read_bytes()
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert_index_is_right(out)


def gpt2(square: bool) -> dict[str, Tensor]:
    """HF Conv1D: (in, out); c_proj of attention is square."""
    return {
        "h.0.attn.c_attn.weight": gaussian(8, 24, seed=1),
        "h.0.attn.c_attn.bias": gaussian(24, seed=2),
        "h.0.attn.c_proj.weight": gaussian(8, 8, seed=3),
        "h.0.attn.c_proj.bias": gaussian(8, seed=4),
        "h.0.mlp.c_fc.weight": gaussian(8, 8 if square else 32, seed=5),
        "h.0.mlp.c_fc.bias": gaussian(8 if square else 32, seed=6),
        "score_net.weight": gaussian(8, 8, seed=7),
        "score_net.bias": gaussian(8, seed=8),
    }


def test_hf_conv1d_by_its_config(tmp_path: Path) -> None:
    folder, state = tmp_path / "gpt2", gpt2(square=True)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    report = convert(folder, "gmp", tmp_path / "out")
    assert not any("axis" in layer for layer in report["layers"]), "nothing was guessed"
    records = records_of(tmp_path / "out" / "model.safetensors")
    axes = {key.split(".")[-2]: record["axis"] for key, record in records.items()}
    assert axes == {"c_attn": 1, "c_proj": 1, "c_fc": 1, "score_net": 0}
    found = tensors_of(tmp_path / "out" / "model.safetensors")
    columns = state["h.0.attn.c_proj.weight"].double().norm(dim=0)
    assert torch.equal(found["h.0.attn.c_proj.r"], columns.float())
    rows = state["score_net.weight"].double().norm(dim=1)
    assert torch.equal(found["score_net.r"], rows.float())


def test_without_a_config_a_square_matrix_is_a_guess_that_is_told(tmp_path: Path) -> None:
    save_file(gpt2(square=False), tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", "gmp", tmp_path / "out.safetensors")
    assumed = {layer["name"] for layer in report["layers"] if "axis" in layer}
    assert assumed == {"h.0.attn.c_proj", "score_net"}
    table = done("convert", tmp_path / "model.safetensors", "--to", "gmp", "--dry-run").out
    assert (
        "2 layers: units taken on axis 0 (--axis GLOB=1 if transposed): h.0.attn.c_proj, score_net" in table
    )
    records = records_of(tmp_path / "out.safetensors")
    assert records["h.0.attn.c_attn.weight"]["axis"] == 1, "its bias tells"
    assert records["h.0.mlp.c_fc.weight"]["axis"] == 1


def test_the_axis_can_be_named(tmp_path: Path) -> None:
    state = gpt2(square=True)
    state |= {"up.weight": gaussian(6, 6, 3, seed=9), "up.bias": gaussian(6, seed=10)}
    save_file(state, tmp_path / "model.safetensors")
    report = convert(
        tmp_path / "model.safetensors",
        "gmp",
        tmp_path / "out.safetensors",
        "--axis",
        "h.*=1",
        "--axis",
        "up=1",
    )
    assert {layer["name"] for layer in report["layers"] if "axis" in layer} == {"score_net"}
    records, found = records_of(tmp_path / "out.safetensors"), tensors_of(tmp_path / "out.safetensors")
    assert {key: record["axis"] for key, record in records.items() if record["axis"]} == dict.fromkeys(
        [key for key in records if key != "score_net.weight"], 1
    )
    units = state["up.weight"].movedim(1, 0).reshape(6, -1)
    assert bits(found["up.r"]) == bits(units.double().norm(dim=1).float())
    convert(tmp_path / "out.safetensors", "sp", tmp_path / "sp.safetensors")
    again = tensors_of(tmp_path / "sp.safetensors")["up.weight"]
    oracles.assert_came_back(again.movedim(1, 0).reshape(6, -1), units, torch.float32)


def test_a_trainer_s_files_beside_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(a_model(), folder / "pytorch_model.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    done("convert", folder, "--to", "gmp")
    assert sorted(p.name for p in (tmp_path / "model-gmp").iterdir()) == ["model.safetensors"]
