"""Tables of numbers in every format: their columns, and the task that their targets tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import FLOAT32, Writer, everything, numbers, pictures, save_arrays, table_text, whole

from reparam.training.data import load_data
from reparam.training.data.split import Subset


def columns_parquet(path: Path) -> Path:
    features, target = numbers()
    table = {name: features[:, i] for i, name in enumerate("abc")} | {"y": target}
    pq.write_table(pa.table(table), path)
    return path


def text_file(path: Path, delimiter: str, header: bool) -> Path:
    path.write_text(table_text(delimiter, header))
    return path


TABLES: dict[str, Writer] = {
    "csv": lambda p: text_file(p / "t.csv", ",", True),
    "csv without header": lambda p: text_file(p / "t.csv", ",", False),
    "semicolons": lambda p: text_file(p / "t.csv", ";", True),
    "tsv": lambda p: text_file(p / "t.tsv", "\t", True),
    "spaces": lambda p: text_file(p / "t.txt", "   ", False),
    "tabs and trailing ones": lambda p: text_file(p / "t.txt", " \t ", False),
    "commas in txt": lambda p: text_file(p / "t.txt", ",", True),
    "parquet": lambda p: columns_parquet(p / "t.parquet"),
    "npz": lambda p: save_arrays(p / "t.npz", x=numbers()[0], y=numbers()[1].astype(np.float64)),
    "safetensors": lambda p: save_arrays(
        p / "t.safetensors", data=numbers()[0], target=numbers()[1][:, None]
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_numbers_and_a_target(tmp_path: Path, kind: str) -> None:
    data = load_data(str(TABLES[kind](tmp_path)), validation=0.25)
    inputs, targets = whole(data)
    features, target = numbers()
    assert inputs.dtype == targets.dtype == torch.float32
    assert torch.equal(inputs, torch.from_numpy(features))
    assert torch.equal(targets, torch.from_numpy(target)[:, None])
    assert (data.task, data.classes, data.targets, data.shape) == ("regress", (), 1, (3,))
    assert len(data.validation) == 3
    chosen = everything(data.train)[0].double()
    assert torch.allclose(torch.tensor(data.mean).double(), chosen.mean(0), rtol=0, atol=FLOAT32)
    assert torch.allclose(torch.tensor(data.std).double(), chosen.std(0, correction=0), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(
    ("inputs", "target", "columns", "targets"),
    [
        ((), None, "abc", "y"),
        ((), "b", "acy", "b"),
        (("c", "a"), "y", "ca", "y"),
        ("0-1", "3", "ab", "y"),
        ("a,2", "y", "ac", "y"),
        ("0", ("1", "2-3"), "a", "bcy"),
        ((), "b,c", "ay", "bc"),
    ],
)
def test_columns(tmp_path: Path, inputs: str, target: str, columns: str, targets: str) -> None:
    features, last = numbers()
    every = dict(zip("abcy", np.column_stack([features, last]).T, strict=True))
    path = text_file(tmp_path / "t.csv", ",", True)
    data = load_data(str(path), inputs=inputs, target=target)
    found, wanted = whole(data)
    assert torch.equal(found, torch.from_numpy(np.stack([every[name] for name in columns], 1)))
    assert torch.equal(wanted, torch.from_numpy(np.stack([every[name] for name in targets], 1)))
    assert data.targets == len(targets)


@pytest.mark.parametrize(
    ("text", "task", "classes", "first"),
    [
        ("x,label\n1,no\n2,yes\n3,no\n4,yes\n", None, ("no", "yes"), 0),
        ("1,yes\n2,no\n3,no\n4,yes\n", None, ("no", "yes"), 1),
        ("x,label\n1,1\n2,0\n3,2\n4,1\n", None, ("0", "1", "2"), 1),
        ("x,label\n1,1.0\n2,0.0\n3,2.0\n4,1.0\n", "classify", ("0", "1", "2"), 1),
        ("x,label\n1,1.0\n2,0.0\n3,2.0\n4,1.0\n", None, (), 1.0),
        ("x,label\n1,1\n2,0\n3,2\n4,1\n", "regress", (), 1.0),
        # Quoted, with the delimiter and a line break within; blank lines between.
        ('x,class\n1,"b, c"\n\n2,"a\nz"\n3,"b, c"\n4,"a\nz"\n', None, ("a\nz", "b, c"), 1),
        ("0,1,label\n7,7,b\n7,8,a\n8,8,a\n9,9,b\n", None, ("a", "b"), 1),  # numbers that name columns
    ],
)
def test_the_task_is_told_by_the_targets(
    tmp_path: Path, text: str, task: str | None, classes: tuple[str, ...], first: float
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    data = load_data(str(path), task=task, validation=0.5)
    assert isinstance(data.train, Subset)
    targets = everything(data.train.samples)[1]
    assert data.classes == classes
    assert data.task == ("classify" if classes else "regress")
    assert (len(targets), targets.reshape(-1)[0]) == (4, first)
    assert any(note.startswith("task: ") for note in data.notes) == (task is None)


def test_many_integers_are_numbers(tmp_path: Path) -> None:
    values = np.arange(200)
    few = save_arrays(tmp_path / "few.npz", x=np.ones((200, 2)) * values[:, None], y=values % 100)
    many = save_arrays(tmp_path / "many.npz", x=np.ones((200, 2)) * values[:, None], y=values)
    images = save_arrays(tmp_path / "images.npz", x=pictures(200), y=values)
    assert [load_data(str(p)).task for p in (few, many, images)] == ["classify", "regress", "classify"]


@pytest.mark.parametrize(
    ("name", "target", "inputs", "rows", "features"),
    [
        ("bostonHousing", "13", (), 506, 13), ("concrete", "8", (), 1030, 8), ("energy", "8", "0-7", 768, 8),
        ("naval-propulsion-plant", "16", "0-15", 11934, 16), ("power-plant", "4", (), 9568, 4),
        ("wine-quality-red", "11", (), 1599, 11), ("yacht", "6", (), 308, 6),
    ],
)  # fmt: skip
def test_the_uci_sets(name: str, target: str, inputs: str, rows: int, features: int, shared: Path) -> None:
    path = shared / "data" / "uci" / f"{name}.txt"
    data = load_data(str(path), task="regress", target=target, inputs=inputs)
    assert isinstance(data.train, Subset)
    table = np.loadtxt(path)
    found, targets = everything(data.train.samples)
    assert np.array_equal(found.numpy(), table[:, :features].astype(np.float32))
    assert np.array_equal(targets[:, 0].numpy(), table[:, int(target)].astype(np.float32))
    assert (len(found), data.shape) == (rows, (features,))
