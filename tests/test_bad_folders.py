"""Sharded sets and folders that are incomplete, contradict themselves, or point elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import convert, gaussian, refused, run

INDEX = "model.safetensors.index.json"


def a_set(folder: Path) -> dict[str, Any]:
    """Two shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": gaussian(4, 6)}, folder / "one.safetensors")
    save_file({"b.weight": gaussian(4, 6, seed=1)}, folder / "two.safetensors")
    index = {
        "metadata": {"total_size": 192},
        "weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return index


def assert_refused(folder: Path, *naming: object) -> None:
    for path in (folder, folder / INDEX):
        refused("convert", path, "--to", "gmp", naming=naming, leaving=folder.parent)
        refused("inspect", path, naming=naming)


ESCAPES = [
    "../outside.safetensors", "..\\outside.safetensors", "sub/../../outside.safetensors", "a/..\\..\\outside.safetensors",
    "/etc/passwd", "C:\\windows\\model.safetensors", "\\\\host\\share\\model.safetensors", "C:model.safetensors", "..", "/",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_that_points_elsewhere(name: str, tmp_path: Path) -> None:
    save_file({"b.weight": gaussian(4, 6)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    index = a_set(folder)
    index["weight_map"]["b.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, INDEX, "b.weight")


def test_an_absolute_path_to_a_shard_that_is_there(tmp_path: Path) -> None:
    """Even its own."""
    folder = tmp_path / "model"
    index = a_set(folder)
    index["weight_map"]["b.weight"] = str(folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, INDEX, "b.weight")


Change = Callable[[dict[str, Any]], object]

INDEXES: dict[str, tuple[Change, str]] = {
    "a shard that is missing": (lambda i: i["weight_map"].update({"c.weight": "three.safetensors"}), "three.safetensors"),
    "a key its shard has not": (lambda i: i["weight_map"].update({"c.weight": "two.safetensors"}), "c.weight"),
    "a key in the other shard": (lambda i: i["weight_map"].update({"a.weight": "two.safetensors"}), "a.weight"),
    "one file by two names": (lambda i: i["weight_map"].update({"b.weight": "./two.safetensors", "c": "two.safetensors"}), ""),
    "a name that is a number": (lambda i: i["weight_map"].update({"b.weight": 2}), "b.weight"),
    "an empty name": (lambda i: i["weight_map"].update({"b.weight": ""}), "b.weight"),
    "the folder itself": (lambda i: i["weight_map"].update({"b.weight": "."}), ""),
    "a file that is no shard": (lambda i: i["weight_map"].update({"b.weight": INDEX}), INDEX),
    "a name with a null": (lambda i: i["weight_map"].update({"b.weight": "two\0.safetensors"}), ""),
    "a name of 300 letters": (lambda i: i["weight_map"].update({"b.weight": "x" * 300}), ""),
    "no weight_map": (lambda i: i.pop("weight_map"), "weight_map"),
    "an empty weight_map": (lambda i: i.update(weight_map={}), "weight_map"),
    "a weight_map that is a list": (lambda i: i.update(weight_map=["one.safetensors"]), "weight_map"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "names"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_is_wrong(change: Change, names: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    index = a_set(folder)
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, names)


TEXTS = {
    "empty": b"",
    "not JSON": b"{weight_map}",
    "not UTF-8": b'{"weight_map": {"\xff": "one.safetensors"}}',
    "a list": b"[]",
    "nested too deep": b'{"weight_map":' * 100_000,
    "truncated": b'{"weight_map": {"a.weight": "one.safe',
    "NaN": b"NaN",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_that_is_none(text: bytes, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    a_set(folder)
    (folder / name).write_bytes(text)
    assert_refused(folder, name)


def test_metadata_of_an_index_may_be_anything(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    index = a_set(folder)
    for i, metadata in enumerate(([1], None, {"total_size": "many"})):
        (folder / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
        convert(folder, "gmp", tmp_path / f"out{i}")
        written = json.loads((tmp_path / f"out{i}" / INDEX).read_text())
        sizes = [
            t.nbytes for f in (tmp_path / f"out{i}").glob("*.safetensors") for t in load_file(f).values()
        ]
        assert written["metadata"]["total_size"] == sum(sizes)


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    a_set(folder)
    save_file({"b.weight": gaussian(4, 6), "a.weight": gaussian(4, 6)}, folder / "two.safetensors")
    assert_refused(folder, "a.weight", "one.safetensors")


def test_a_broken_shard_is_the_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    a_set(folder)
    data = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(data[:-1])
    assert_refused(folder, "two.safetensors")


def test_a_shard_that_holds_nan(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    a_set(folder)
    save_file({"b.weight": torch.full((4, 6), torch.nan)}, folder / "two.safetensors")
    refused("convert", folder, "--to", "gmp", naming=("b.weight",), leaving=tmp_path)


def test_folders_without_a_checkpoint_or_with_several(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("convert", tmp_path / "empty", "--to", "gmp", naming=("empty", "safetensors"), leaving=tmp_path)
    (tmp_path / "several").mkdir()
    for name in ("a", "b"):
        save_file({"a.weight": gaussian(4, 6)}, tmp_path / "several" / f"{name}.safetensors")
    naming = ("several", "a.safetensors", "b.safetensors")
    refused("convert", tmp_path / "several", "--to", "gmp", naming=naming, leaving=tmp_path)
    (tmp_path / "shards-only").mkdir()
    a_set(tmp_path / "shards-only")
    (tmp_path / "shards-only" / INDEX).unlink()
    refused("convert", tmp_path / "shards-only", "--to", "gmp", naming=("shards-only", "one.safetensors"))


@pytest.mark.parametrize(
    "name", ["gone.safetensors", "gone", "gone/model.safetensors", "x" * 300, "a\nb.safetensors"]
)
def test_paths_that_are_not_there(name: str, tmp_path: Path) -> None:
    for command in (["convert", tmp_path / name, "--to", "gmp"], ["inspect", tmp_path / name]):
        refused(*command, naming=("no such" if len(name) < 100 else "",))


def test_a_folder_called_like_a_file(tmp_path: Path) -> None:
    a_set(tmp_path / "model.safetensors")
    assert run("inspect", tmp_path / "model.safetensors").code == 0
    (tmp_path / "index" / INDEX).mkdir(parents=True)
    refused("inspect", tmp_path / "index")
