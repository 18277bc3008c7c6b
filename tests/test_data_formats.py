"""Every format of dataset: the same samples come out, with their classes, task and parts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import (
    CLASSES,
    class_folders,
    described,
    encoded,
    idx_files,
    image_parquet,
    labels_of,
    numbers,
    pictures,
    save_arrays,
    stored,
    table_text,
)
from PIL import Image
from support import SHARED
from torch import Tensor

from reparam.errors import DataError
from reparam.training.data import Data, Samples, load_data, normalize
from reparam.training.data.split import Subset

FLOAT32 = 1e-6
PICTURES, LABELS = pictures(), labels_of()
NAMES = [CLASSES[label] for label in LABELS]
BY_CLASS = np.argsort(LABELS, kind="stable")
NUMBERED = ("0", "1", "2")


def everything(samples: Samples) -> tuple[Tensor, Tensor]:
    return samples.take(range(len(samples)))


def whole(data: Data) -> tuple[Tensor, Tensor]:
    """All samples in the order of the file, though they are drawn into two parts."""
    assert isinstance(data.train, Subset)
    assert isinstance(data.validation, Subset)
    both = sorted([*data.train.indices, *data.validation.indices])
    assert both == list(range(12))
    return everything(data.train.samples)


Writer = Callable[[Path], Path]
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


def test_grey_and_transparent_images(tmp_path: Path) -> None:
    """One colour image makes all of them RGB; without one, all stay one channel."""
    folder = class_folders(tmp_path / "set", pictures(channels=1))
    with_alpha = Image.fromarray(pictures(1)[0]).convert("LA")
    with_alpha.save(folder / "cat" / "000.png")
    data = load_data(str(folder))
    assert data.shape == (1, 6, 5)
    assert any("1 have an alpha channel" in note for note in data.notes)
    Image.fromarray(PICTURES[0]).save(folder / "cat" / "000.png")
    data = load_data(str(folder))
    assert data.shape == (3, 6, 5)
    assert any("11 of 12 are grey" in note for note in data.notes)
    images = whole(data)[0]
    assert torch.equal(images[0], stored(PICTURES)[0])
    assert torch.equal(images[1], stored(pictures(channels=1))[3].expand(3, -1, -1))


def test_palette_images(tmp_path: Path) -> None:
    """With transparency given as bytes, which Pillow warns of when it is not dropped."""
    folder = class_folders(tmp_path / "set", PICTURES)
    palette = Image.fromarray(PICTURES[0]).quantize(8)
    palette.save(folder / "cat" / "000.png", transparency=bytes([0, 128, 255]))
    colours = np.asarray(palette.convert("RGB"))
    assert torch.equal(whole(load_data(str(folder)))[0][0], stored(colours[None])[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_resizing_keeps_the_middle(tmp_path: Path, kind: str) -> None:
    """Vertical stripes, whose middle third alone is white: a square cut from the middle of a wide image."""
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = 255
    folder = class_folders(tmp_path / "set", np.stack([wide] * 3), kind)
    (folder / "cat" / "tall.png").write_bytes(encoded(tall))
    with pytest.raises(DataError, match=r"differ in size: \S+000.\w+ is 120x40, \S+tall.png 30x90; --size N"):
        load_data(str(folder))
    data = load_data(str(folder), size=8, validation=0.5, normalize=False)
    assert data.shape == (3, 8, 8)
    for part in (data.train, data.validation):
        inner = everything(part)[0][:, :, 1:-1, 1:-1]
        assert int(inner.min()) >= 250


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_resizing_is_pillows(tmp_path: Path, kind: str) -> None:
    """A square image has no middle to cut, and half its size leaves a JPEG decoder nothing to skip: the values are those of
    Pillow's own filter on the whole image."""
    files = [encoded(image, kind) for image in pictures(3, size=(32, 32))]
    folder = class_folders(tmp_path / "set", pictures(3, size=(32, 32)), kind)
    data = load_data(str(folder), size=16, validation=0.34)
    assert isinstance(data.train, Subset)
    expected = [
        np.asarray(Image.open(io.BytesIO(file)).resize((16, 16), Image.Resampling.BILINEAR)) for file in files
    ]
    assert torch.equal(everything(data.train.samples)[0], stored(np.stack(expected)))


def test_files_that_are_no_images_are_told(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", PICTURES)
    (folder / "cat" / "Thumbs.db").write_bytes(b"")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / "dog" / "deep").mkdir()
    (folder / "dog" / "001.png").rename(folder / "dog" / "deep" / "001.png")
    data = load_data(str(folder))
    assert data.classes == CLASSES
    assert len(data.train) + len(data.validation) == 12
    assert [note for note in data.notes if "left out" in note] == [
        f"{folder}: left out, as no images by their names: 1 files (cat/Thumbs.db)"
    ]


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


def test_given_normalization(tmp_path: Path) -> None:
    path = str(save_arrays(tmp_path / "set.npz", x=PICTURES, y=LABELS))
    assert load_data(path, mean=(0.5,), std=(0.25,)).mean == (0.5, 0.5, 0.5)
    assert load_data(path, mean=(0.1, 0.2, 0.3), std=(1, 2, 3)).std == (1.0, 2.0, 3.0)
    plain = load_data(path, normalize=False)
    assert (plain.mean, plain.std) == ((), ())
    assert "inputs: pixels scaled to [0, 1], not normalized" in plain.notes


def test_constant_features_keep_a_std_of_one(tmp_path: Path) -> None:
    values = numbers()[0].copy()
    values[:, 1] = 0.1
    data = load_data(str(save_arrays(tmp_path / "t.npz", x=values, y=numbers()[1])))
    assert data.std[1] == 1.0
    assert data.std[0] > 2
    assert abs(data.mean[1] - 0.1) < 1e-8
    assert "inputs 1 are constant: their std is taken as 1" in data.notes


def test_statistics_of_large_values_do_not_cancel(tmp_path: Path) -> None:
    values = (1e6 + np.random.default_rng(0).normal(size=(600, 1))).astype(np.float32)
    data = load_data(str(save_arrays(tmp_path / "t.npz", x=values, y=values[:, 0])))
    chosen = everything(data.train)[0].double()
    assert abs(data.std[0] / float(chosen.std(correction=0)) - 1) < 1e-9


def test_a_selection_of_many_images_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded images are sampled, and the notes say so; the mean is near that of all."""
    monkeypatch.setattr(normalize, "_MEASURED", 300)
    path = image_parquet(tmp_path / "set.parquet", pictures(400), labels_of(400).tolist())
    data = load_data(str(path), validation=0.01)
    assert any("of 300 of the 396 training samples, seed 0" in note for note in data.notes)
    everywhere = everything(data.train)[0].double().mean((0, 2, 3)) / 255
    # Three standard errors of a uniform value over 300 × 30 pixels.
    assert 0 < float((torch.tensor(data.mean) - everywhere).abs().max()) < 0.01
    assert load_data(str(path), validation=0.01).mean == data.mean


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


def test_integers_stay_integers_without_normalization(tmp_path: Path) -> None:
    tokens = np.arange(24).reshape(12, 2)
    path = str(save_arrays(tmp_path / "t.npz", x=tokens, y=LABELS))
    data = load_data(path, normalize=False)
    assert torch.equal(whole(data)[0], torch.from_numpy(tokens))
    assert data.mean == ()


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


needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared")


@needs_shared
def test_the_cifar10_parquet() -> None:
    data = load_data(str(SHARED / "data" / "cifar10" / "test.parquet"), validation=0.5)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert (data.targets, data.shape, len(data.train)) == (10, (3, 32, 32), 5000)
    assert data.validation.take(range(50))[0].dtype == torch.uint8


@needs_shared
@pytest.mark.parametrize(
    ("name", "target", "inputs", "rows", "features"),
    [
        ("bostonHousing", "13", (), 506, 13), ("concrete", "8", (), 1030, 8), ("energy", "8", "0-7", 768, 8),
        ("naval-propulsion-plant", "16", "0-15", 11934, 16), ("power-plant", "4", (), 9568, 4),
        ("wine-quality-red", "11", (), 1599, 11), ("yacht", "6", (), 308, 6),
    ],
)  # fmt: skip
def test_the_uci_sets(name: str, target: str, inputs: str, rows: int, features: int) -> None:
    path = SHARED / "data" / "uci" / f"{name}.txt"
    data = load_data(str(path), task="regress", target=target, inputs=inputs)
    assert isinstance(data.train, Subset)
    table = np.loadtxt(path)
    found, targets = everything(data.train.samples)
    assert np.array_equal(found.numpy(), table[:, :features].astype(np.float32))
    assert np.array_equal(targets[:, 0].numpy(), table[:, int(target)].astype(np.float32))
    assert (len(found), data.shape) == (rows, (features,))
