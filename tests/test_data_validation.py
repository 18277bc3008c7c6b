"""The part for validation: one that the data names, another path, or one drawn by the seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_files import (
    CLASSES,
    LABELS,
    NAMES,
    PICTURES,
    Writer,
    class_folders,
    described,
    everything,
    image_parquet,
    labels_of,
    pictures,
    save_arrays,
    stored,
)

from reparam.training.data import load_data

OTHER, OTHER_LABELS = pictures(6, seed=5), labels_of(6)
TWO_PARTS: dict[str, Writer] = {
    "folders": lambda p: class_folders(class_folders(p / "train", PICTURES).parent / "valid", OTHER).parent,
    "test folder": lambda p: class_folders(class_folders(p / "train", PICTURES).parent / "test", OTHER).parent,
    "metadata": lambda p: described(described(p / "train", PICTURES, NAMES).parent / "val", OTHER, NAMES[:6]).parent,
    "parquet": lambda p: image_parquet(
        image_parquet(p / "train.parquet", PICTURES, LABELS.tolist()).parent / "test.parquet", OTHER, [0, 1, 2] * 2
    ).parent,
    "npz": lambda p: save_arrays(
        p / "set.npz", x_train=PICTURES, y_train=LABELS, x_test=OTHER, y_test=OTHER_LABELS
    ),
    "safetensors": lambda p: save_arrays(
        p / "set.safetensors", train_images=PICTURES, train_labels=LABELS, val_images=OTHER, val_labels=OTHER_LABELS
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_a_part_for_validation(tmp_path: Path, kind: str) -> None:
    data = load_data(str(TWO_PARTS[kind](tmp_path)))
    train, validation = (
        sorted(map(bytes, everything(part)[0].numpy())) for part in (data.train, data.validation)
    )
    assert train == sorted(map(bytes, stored(PICTURES).numpy()))
    assert validation == sorted(map(bytes, stored(OTHER).numpy()))
    assert len(data.classes) == data.targets == 3
    assert any(note.startswith("validation: ") for note in data.notes)


def test_another_path_for_validation(tmp_path: Path) -> None:
    """Class names decide, not their order: the other folder lacks the first class."""
    class_folders(tmp_path / "a", PICTURES)
    class_folders(tmp_path / "b", OTHER)
    for file in (tmp_path / "b" / "cat").iterdir():
        file.unlink()
    (tmp_path / "b" / "cat").rmdir()
    data = load_data(str(tmp_path / "a"), val_path=str(tmp_path / "b"))
    assert (len(data.train), len(data.validation)) == (12, 4)
    assert everything(data.validation)[1].tolist() == [1, 1, 2, 2]
    assert data.classes == CLASSES


def test_huggingface_names_may_come_in_another_order(tmp_path: Path) -> None:
    """A validation file that numbers its classes otherwise is read by names."""
    image_parquet(tmp_path / "train.parquet", PICTURES, LABELS.tolist())
    table = pq.read_table(image_parquet(tmp_path / "test.parquet", OTHER, [0, 1, 2] * 2))
    features = {"label": {"names": ["emu", "cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "test.parquet")
    data = load_data(str(tmp_path))
    assert data.classes == CLASSES
    assert everything(data.validation)[1].tolist() == [2, 0, 1, 2, 0, 1]


def test_the_split_is_seeded_and_stratified(tmp_path: Path) -> None:
    rare = np.array([0] * 70 + [1] * 20 + [2] * 10)
    path = str(save_arrays(tmp_path / "t.npz", x=np.arange(100.0)[:, None], y=rare))
    first, again, other = (load_data(path, validation=0.2, seed=seed) for seed in (0, 0, 1))
    chosen = [everything(data.validation)[0].flatten().tolist() for data in (first, again, other)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert everything(first.validation)[1].bincount().tolist() == [14, 4, 2]
    assert not set(chosen[0]) & set(everything(first.train)[0].flatten().tolist())
    # Fewer than the classes: none is preferred for its number.
    drawn = [int(everything(load_data(path, validation=0.01, seed=s).validation)[1]) for s in range(5)]
    assert drawn == [0] * 5  # the middle of the largest class's first share comes before all others
    even = str(save_arrays(tmp_path / "even.npz", x=np.arange(100.0)[:, None], y=np.arange(100) % 10))
    drawn = [int(everything(load_data(even, validation=0.01, seed=s).validation)[1]) for s in range(8)]
    assert len(set(drawn)) > 3
