"""IDX data, the training loop, and the fine-tuning stage on the bundled network."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import reparam.demo.model as demo_model
from reparam import pipeline
from reparam.checkpoint import convert_checkpoint, load_state_dict
from reparam.errors import ArchitectureError, CheckFailedError, DataError, OutputError, ReparamError
from reparam.graph import fold
from reparam.graph.exchange import replace_modules
from reparam.layers import GmPConv2d
from reparam.training import Dataset, Recipe, accuracy, finetune, load_dataset

BUNDLED = Path(demo_model.__file__).parent / "data"
ARCH = "reparam.demo.model:small_cnn"
NO_LOSS = 0.01  # of test accuracy: ten of the 1,000 images, one standard error
SHORT = Recipe(steps=3, batch_size=32)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset(BUNDLED)


def trained() -> nn.Module:
    """The bundled network with its convolutions in GmP."""
    model = demo_model.small_cnn()
    model.load_state_dict(load_state_dict(BUNDLED / "small_cnn.safetensors")[0])
    return replace_modules(model, lambda m: GmPConv2d.from_plain(m) if type(m) is nn.Conv2d else None)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder: Path, train: int = 6, test: int = 4) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def test_the_bundled_set(data: Dataset) -> None:
    assert data.train.images.shape == (2000, 1, 28, 28)
    assert data.test.images.dtype == torch.float32
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 100))
    assert (round(data.mean, 4), round(data.std, 4)) == (demo_model.MEAN, demo_model.STD)
    assert abs(float(data.train.images.double().mean())) < 1e-6
    assert abs(float(data.train.images.double().std(correction=0)) - 1) < 1e-6


def test_pixels_and_labels_are_the_files(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    read = load_dataset(folder, mean=0.5, std=0.25)
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    expected = (torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(4, 1, 5, 4) / 255 - 0.5) / 0.25
    assert torch.equal(read.test.images, expected)
    assert read.test.labels.tolist() == [0, 1, 2, 0]
    assert (len(read.train), read.classes) == (6, 3)


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / name
        raw = file.read_bytes()
        packed = name.endswith(".gz")
        changed = change(gzip.decompress(raw) if packed else raw)
        file.write_bytes(gzip.compress(changed) if packed else changed)

    return apply


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / LABELS).unlink(), "no t10k-labels-idx1-ubyte.gz or t10k-labels-idx1-ubyte"),
        (rewrite(IMAGES, lambda b: b"\x89PNG" + b[4:]), f"{IMAGES}: not an IDX file"),
        (rewrite(LABELS, lambda b: b[:3]), f"{LABELS}: not an IDX file"),
        (rewrite(IMAGES, lambda b: b[:-1]), rf"{IMAGES}: the header says \[6, 5, 4\], but 119 bytes follow"),
        (rewrite(LABELS, lambda b: idx(np.zeros(9, np.uint8))), "t10k-images.*: 4 images, but 9 labels in"),
        (lambda f: (f / IMAGES).write_bytes((f / IMAGES).read_bytes()[:-9]), f"{IMAGES}: cannot be read"),
        (lambda f: (f / IMAGES).write_bytes(b"not gzip"), f"{IMAGES}: cannot be read"),
        (
            rewrite(IMAGES, lambda b: idx(np.full((6, 5, 4), 3, np.uint8))),
            "cannot be standardized with mean 0.0117647 and standard deviation 0",
        ),
        (
            rewrite(IMAGES, lambda b: idx(np.ones((6, 5, 5), np.uint8))),
            r"images are \[5, 5\], test images \[5, 4\]",
        ),
    ],
)
def test_a_damaged_set_names_the_file(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(write_set(tmp_path))
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(tmp_path / "none")


def test_gmp_fine_tuning_lowers_the_loss_and_keeps_the_accuracy(data: Dataset) -> None:
    model = trained()
    theta = model.conv2.theta.detach().clone()
    steps: list[int] = []
    result = finetune(model, data, Recipe(), on_step=lambda step, loss: steps.append(step))
    assert result.accuracy_before == 0.864
    assert result.accuracy_after >= result.accuracy_before - NO_LOSS
    assert steps == list(range(1, 51))
    assert np.mean(result.losses[-10:]) < np.mean(result.losses[:10])
    assert not torch.equal(model.conv2.theta, theta)
    assert not model.training
    assert accuracy(fold(model), data.test) == result.accuracy_after


def test_the_same_seed_gives_the_same_weights(data: Dataset) -> None:
    models = [trained(), trained(), trained()]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        finetune(model, data, Recipe(steps=3, batch_size=32, seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv1.theta"], third["conv1.theta"])


def test_angles_follow_their_own_rate(data: Dataset) -> None:
    for recipe, moved in (
        (Recipe(steps=2, lr=0.0), {"theta"}),
        (Recipe(steps=2, angle_lr=0.0), {"r", "weight", "bias"}),
    ):
        model = trained()
        before = {key: value.clone() for key, value in model.named_parameters()}
        finetune(model, data, recipe)
        changed = {k.rpartition(".")[2] for k, v in model.named_parameters() if not torch.equal(v, before[k])}
        assert changed == moved


def test_divergence_is_a_failed_check_with_advice(data: Dataset) -> None:
    with pytest.raises(
        CheckFailedError, match=r"at step \d+: training diverged; lower --angle-lr \(now 0.001\)"
    ):
        finetune(trained(), data, Recipe(lr=1e30))


def test_a_model_that_does_not_fit_the_data_is_found_before_the_first_step(data: Dataset) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 4))
    with pytest.raises(DataError, match="4 outputs, the data 10 classes"):
        finetune(flat, data, SHORT)
    with pytest.raises(DataError, match=r"does not take images of \[1, 28, 28\]"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), data, SHORT)
    with pytest.raises(DataError, match=r"gives \[2, 1, 28, 28\] for two images"):
        finetune(nn.Identity(), data, SHORT)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch_size": 0}, {"lr": -1.0}, {"angle_lr": float("nan")}])
def test_a_recipe_that_makes_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ReparamError, match="--"):
        Recipe(**bad)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gmp") / "cnn.gmp.safetensors"
    convert_checkpoint(BUNDLED / "small_cnn.safetensors", to="gmp", output=path)
    return path


def test_the_stage_writes_a_checkpoint_held_like_its_input(converted: Path, tmp_path: Path) -> None:
    run = pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", SHORT)
    before, records = load_state_dict(converted)
    after, kept = load_state_dict(run.output)
    assert "conv1.weight" in kept
    assert kept == records
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert not torch.equal(after["conv1.theta"], before["conv1.theta"])
    assert int(after["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"]) == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[1:-1]] == list(run.result.losses)
    assert lines[-1]["accuracy_after"] == run.result.accuracy_after
    with pytest.raises(OutputError, match="exists"):
        pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", SHORT)


def test_the_stage_leaves_nothing_behind_when_it_fails(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(CheckFailedError):
        pipeline.finetune(converted, ARCH, BUNDLED, out, Recipe(lr=1e30))
    with pytest.raises(ArchitectureError, match=r"holds weights, not a network: give --arch file\.py:fn"):
        pipeline.finetune(converted, None, BUNDLED, out)
    with pytest.raises(
        ArchitectureError, match=r"`conv1.weight`: the file holds this layer, Linear does not"
    ):
        pipeline.finetune(
            converted, "torch.nn:Linear", BUNDLED, out, arch_args={"in_features": "2", "out_features": "2"}
        )
    assert not out.exists()
