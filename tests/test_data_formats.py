"""Labelled images in every format: the same samples come out, with their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    CLASSES,
    FLOAT32,
    LABELS,
    NAMES,
    PICTURES,
    Writer,
    class_folders,
    described,
    everything,
    idx_files,
    image_parquet,
    pictures,
    save_arrays,
    stored,
    whole,
)

from reparam.errors import DataError
from reparam.training.data import load_data
from reparam.training.data.split import Subset

BY_CLASS = np.argsort(LABELS, kind="stable")
NUMBERED = ("0", "1", "2")
IMAGE_SETS: dict[str, tuple[Writer, tuple[str, ...], np.ndarray]] = {
    "class folders": (lambda p: class_folders(p / "set", PICTURES), CLASSES, BY_CLASS),
    "train/ alone": (lambda p: class_folders(p / "set/train", PICTURES).parent, CLASSES, BY_CLASS),
    "metadata.csv": (lambda p: described(p / "set", PICTURES, NAMES), CLASSES, np.arange(12)),
    "metadata.jsonl": (lambda p: described(p / "set", PICTURES, NAMES, "jsonl"), CLASSES, np.arange(12)),
    "metadata of numbers": (lambda p: described(p / "set", PICTURES, LABELS.tolist(), "jsonl"), NUMBERED, np.arange(12)),
    "the metadata file": (
        lambda p: described(p / "set", PICTURES, NAMES) / "metadata.csv", CLASSES, np.arange(12),
    ),
    "parquet": (lambda p: image_parquet(p / "set.parquet", PICTURES, LABELS.tolist()), CLASSES, np.arange(12)),
    "parquet without names": (
        lambda p: image_parquet(p / "set.parquet", PICTURES, LABELS.tolist(), named=False), NUMBERED, np.arange(12),
    ),
    "npz": (lambda p: save_arrays(p / "set.npz", x=PICTURES, y=LABELS), NUMBERED, np.arange(12)),
    "npz with channels first": (
        lambda p: save_arrays(p / "set.npz", images=PICTURES.transpose(0, 3, 1, 2), labels=LABELS.astype(np.uint8)),
        NUMBERED, np.arange(12),
    ),
    "safetensors": (
        lambda p: save_arrays(p / "set.safetensors", inputs=PICTURES, targets=LABELS), NUMBERED, np.arange(12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGE_SETS)
def test_images_and_classes(tmp_path: Path, kind: str) -> None:
    write, classes, order = IMAGE_SETS[kind]
    data = load_data(str(write(tmp_path)), validation=0.25)
    images, labels = whole(data)
    assert images.dtype == torch.uint8
    assert torch.equal(images, stored(PICTURES[order]))
    assert (labels.dtype, labels.tolist()) == (torch.int64, LABELS[order].tolist())
    assert (data.task, data.classes, data.targets, data.shape) == ("classify", classes, 3, (3, 6, 5))
    # Twelve samples of three classes, a quarter of each.
    assert sorted(everything(data.validation)[1].tolist()) == [0, 1, 2]
    # Statistics are those of the training part alone.
    pixels = everything(data.train)[0].double() / 255
    assert torch.allclose(torch.tensor(data.mean).double(), pixels.mean((0, 2, 3)), rtol=0, atol=FLOAT32)
    expected = pixels.std((0, 2, 3), correction=0)
    assert torch.allclose(torch.tensor(data.std).double(), expected, rtol=0, atol=FLOAT32)


def test_sharded_parquet(tmp_path: Path) -> None:
    for shard in range(2):
        half = slice(6 * shard, 6 * shard + 6)
        image_parquet(
            tmp_path / f"data/train-0000{shard}-of-00002.parquet", PICTURES[half], LABELS[half].tolist()
        )
    data = load_data(str(tmp_path))
    images, labels = whole(data)
    assert torch.equal(images, stored(PICTURES))
    assert labels.tolist() == LABELS.tolist()
    assert isinstance(data.train, Subset)
    assert data.train.samples.place(8).endswith("train-00001-of-00002.parquet: row 2")
    (tmp_path / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards like train-00001-of-00002\.parquet are there"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("validation", [False, True])
def test_idx(tmp_path: Path, dotted: bool, validation: bool) -> None:
    grey = pictures(channels=1)
    idx_files(tmp_path, "train", grey, LABELS)
    if validation:
        idx_files(tmp_path, "t10k", grey[:4], LABELS[:4])
    if dotted:  # as the copies that unpacked archives are called
        for file in list(tmp_path.iterdir()):
            file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    data = load_data(str(tmp_path))
    images, labels = everything(data.train) if validation else whole(data)
    assert torch.equal(images, stored(grey))
    assert labels.tolist() == LABELS.tolist()
    assert len(data.validation) == (4 if validation else 1)
    assert (data.shape, data.targets) == ((1, 6, 5), 3)


def test_the_cifar10_parquet(shared: Path) -> None:
    data = load_data(str(shared / "data" / "cifar10" / "test.parquet"), validation=0.5)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert (data.targets, data.shape, len(data.train)) == (10, (3, 32, 32), 5000)
    assert data.validation.take(range(50))[0].dtype == torch.uint8
