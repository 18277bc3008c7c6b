"""Batches: what an epoch holds depends on its seed and number alone, not on workers, ranks or where it starts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import FLOAT32, class_folders, labels_of, pictures, save_arrays
from torch import Tensor
from torch.utils.data._utils import signal_handling

from reparam.errors import DataError
from reparam.training.data import Augment, Batches, Data, Samples, load_data
from reparam.training.data.loader import prepare
from reparam.training.data.randomness import sample_keys, seeded, uniform

AUGMENT = Augment(flip=True, crop=2)
Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """26 JPEG files for training, 4 for validation."""
    folder = tmp_path_factory.mktemp("photos")
    return load_data(str(class_folders(folder / "set", pictures(30, size=(8, 8)), "JPEG")), validation=0.13)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Samples whose input is their number, so that batches show which they hold."""
    file = tmp_path_factory.mktemp("counted") / "t.npz"
    save_arrays(
        file, x_train=np.arange(23), y_train=np.arange(23) % 3, x_test=np.arange(7), y_test=np.arange(7) % 3
    )
    return load_data(str(file), normalize=False)


def numbers(batches: Batches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [inputs[:, 0].tolist() for inputs, _ in batches.epoch(epoch, start)]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def same(found: Pairs, expected: Pairs) -> bool:
    assert len(found) == len(expected) > 0
    return all(
        torch.equal(f, e) for pair in zip(found, expected, strict=True) for f, e in zip(*pair, strict=True)
    )


def test_an_epoch_is_a_permutation_without_the_incomplete_batch(counted: Data) -> None:
    batches = Batches(counted, counted.train, batch_size=5, shuffle=True)
    assert batches.steps == 4
    epochs = [flat(numbers(batches, epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 20
        assert set(epoch) < set(range(23))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]
    again = Batches(counted, counted.train, batch_size=5, shuffle=True)
    assert flat(numbers(again, 1)) == epochs[1]
    # Epoch 1 of seed 0 is not epoch 0 of seed 1.
    other = Batches(counted, counted.train, batch_size=5, shuffle=True, seed=1)
    assert flat(numbers(other, 0)) not in epochs


def test_validation_comes_in_order_and_whole(counted: Data) -> None:
    batches = Batches(counted, counted.validation, batch_size=3, shuffle=False)
    assert batches.steps == 3
    assert numbers(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert [targets.tolist() for _, targets in batches.epoch(0)] == [[0, 1, 2], [0, 1, 2], [0]]
    dropped = Batches(counted, counted.validation, batch_size=3, shuffle=False, drop_last=True)
    assert (dropped.steps, numbers(dropped)) == (2, [[0, 1, 2], [3, 4, 5]])
    kept = Batches(counted, counted.train, batch_size=5, shuffle=True, drop_last=False)
    assert sorted(flat(numbers(kept))) == list(range(23))


def test_a_set_smaller_than_a_batch_is_one_batch(counted: Data) -> None:
    batches = Batches(counted, counted.train, batch_size=64, shuffle=True)
    assert batches.steps == 1
    assert [sorted(batch) for batch in numbers(batches)] == [list(range(23))]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(photos: Data, workers: int) -> None:
    def epoch(workers: int) -> Pairs:
        batches = Batches(
            photos, photos.train, batch_size=4, shuffle=True, seed=7, augment=AUGMENT, workers=workers
        )
        return list(batches.epoch(3))

    state = torch.get_rng_state()
    found = epoch(workers)
    # Dropout draws from this generator: a run must not depend on its number of workers.
    assert torch.equal(torch.get_rng_state(), state)
    assert same(found, epoch(0))
    assert found[0][0].shape == (4, 3, 8, 8)
    assert found[0][0].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5])
def test_any_step_can_be_the_first(photos: Data, start: int, workers: int) -> None:
    batches = Batches(photos, photos.train, batch_size=4, shuffle=True, augment=AUGMENT, workers=workers)
    assert same(list(batches.epoch(1, start)), list(batches.epoch(1))[start:])
    assert list(batches.epoch(1, batches.steps)) == []


@pytest.mark.parametrize("world", [2, 4])
def test_a_batch_is_the_parts_of_its_ranks(photos: Data, world: int) -> None:
    def epoch(split: Samples, shuffle: bool, rank: int, world: int) -> Pairs:
        batches = Batches(
            photos, split, batch_size=8, shuffle=shuffle, augment=AUGMENT, rank=rank, world=world
        )
        return list(batches.epoch(2))

    for split, shuffle in ((photos.train, True), (photos.train, False), (photos.validation, False)):
        parts = zip(*(epoch(split, shuffle, rank, world) for rank in range(world)), strict=True)
        joined = [(torch.cat([p[0] for p in step]), torch.cat([p[1] for p in step])) for step in parts]
        assert same(joined, epoch(split, shuffle, 0, 1))


def test_ranks_share_an_incomplete_batch_evenly(counted: Data) -> None:
    sizes = [
        [
            len(b)
            for b in numbers(
                Batches(counted, counted.validation, batch_size=4, shuffle=False, rank=r, world=4)
            )
        ]
        for r in range(4)
    ]
    assert sizes == [[1, 0], [1, 1], [1, 1], [1, 1]]
    # The empty part has the shape of a batch.
    rank = Batches(counted, counted.validation, batch_size=4, shuffle=False, rank=0, world=4)
    inputs, targets = list(rank.epoch(0))[1]
    assert (inputs.shape, targets.shape, targets.dtype) == ((0, 1), (0,), torch.int64)


def test_images_of_an_empty_part(photos: Data) -> None:
    rank = Batches(photos, photos.validation, batch_size=6, shuffle=False, augment=AUGMENT, rank=0, world=6)
    inputs, targets = next(rank.epoch(0))
    assert (inputs.shape, targets.shape) == ((0, 3, 8, 8), (0,))


def test_normalization(photos: Data) -> None:
    raw, _ = photos.validation.take(range(4))
    batch, _ = next(Batches(photos, photos.validation, batch_size=4, shuffle=False).epoch(0))
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (photos.mean, photos.std))
    assert torch.allclose(batch.double(), (raw.double() / 255 - mean) / std, rtol=0, atol=FLOAT32)
    assert torch.equal(prepare(raw, (), ()), raw.float() / 255)
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    assert prepare(values, (2.0, 20.0), (0.5, 5.0)).tolist() == [[-2.0, -2.0], [2.0, 2.0]]
    assert values.tolist() == [[1.0, 10.0], [3.0, 30.0]]
    whole = torch.tensor([[4], [8]])
    assert prepare(whole, (2.0,), (2.0,)).tolist() == [[1.0], [3.0]]
    assert prepare(whole, (), ()).dtype == torch.int64


def test_augmentation_differs_by_epoch_and_sample_only(photos: Data) -> None:
    def first(seed: int, epoch: int, augment: Augment | None = AUGMENT) -> Tensor:
        batches = Batches(photos, photos.train, batch_size=26, shuffle=False, seed=seed, augment=augment)
        return next(batches.epoch(epoch))[0]

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))
    assert torch.equal(first(0, 0, Augment()), first(0, 5, None))
    # The same sample in another batch.
    shuffled = Batches(photos, photos.train, batch_size=26, shuffle=True, augment=AUGMENT)
    pixels = [sorted(map(bytes, batch.numpy())) for batch in (first(0, 4), next(shuffled.epoch(4))[0])]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: has to be at least 1"),
        (
            {"batch_size": 5, "world": 2},
            "--batch-size 5 is of all 2 processes together: give a multiple of 2",
        ),
        ({"batch_size": 2, "augment": Augment(flip=True)}, r"for images \[C, H, W\]; the inputs are \[1\]"),
    ],
)
def test_what_cannot_be_batched(counted: Data, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batches(counted, counted.train, shuffle=True, **options)


class Dying:
    """A process that reads its third sample ends at once; this one may read all."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __len__(self) -> int:
        return 6

    def take(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if 2 in indices and os.getpid() != self.parent:
            os._exit(1)
        return torch.zeros(len(indices), 1), torch.zeros(len(indices), dtype=torch.int64)

    def place(self, index: int) -> str:
        return str(index)


def test_a_worker_that_dies_is_told_in_one_line(counted: Data) -> None:
    with pytest.raises(
        DataError, match=r"--workers 1: a worker process died \(.*\); it may have run out"
    ) as caught:
        list(Batches(counted, Dying(), batch_size=1, shuffle=False, workers=1).epoch(0))
    assert "\n" not in str(caught.value)


def test_workers_are_out_of_reach_of_a_terminal(counted: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the process group of the run, in which its workers are not."""

    class Groups(Dying):
        def take(self, indices: list[int]) -> tuple[Tensor, Tensor]:
            return torch.tensor([[os.getpgrp()]] * len(indices)), torch.zeros(len(indices), dtype=torch.int64)

    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a process without loaders yet
    before = signal.getsignal(signal.SIGCHLD)
    found = next(Batches(counted, Groups(), batch_size=1, shuffle=False, workers=1).epoch(0))[0]
    # Nor does the end of a worker interrupt the run in the midst of a step.
    assert signal.getsignal(signal.SIGCHLD) is before
    assert int(found) != os.getpgrp()


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs of the generator from seed 1234567, as in the reference implementation."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = np.array([1234567], np.uint64)
    assert [int(uniform(state, draw)[0] * 2**53) for draw in range(4)] == [value >> 11 for value in expected]


def test_keys_and_draws_look_independent() -> None:
    keys = sample_keys(3, 1, range(4000))
    assert len(set(keys.tolist())) == 4000
    first, second = uniform(keys, 0), uniform(keys, 1)
    for values in (first, second):
        assert abs(values.mean() - 0.5) < 0.02  # four standard errors
        assert abs(values.std() - 12**-0.5) < 0.01
    for pair in (
        (first, second),
        (first[1:], first[:-1]),
        (first, uniform(sample_keys(3, 2, range(4000)), 0)),
    ):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.06


def test_global_generators_are_put_back() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with seeded(2**64 - 1):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_labels_follow_their_images(tmp_path: Path) -> None:
    """Every image holds its own label, through shuffling, ranks and workers."""
    pixels = np.zeros((30, 8, 8), np.uint8) + (labels_of(30) * 100).astype(np.uint8)[:, None, None]
    data = load_data(str(class_folders(tmp_path / "set", pixels)), normalize=False)
    batches = Batches(data, data.train, batch_size=4, shuffle=True, workers=2, rank=1, world=2)
    for images, labels in batches.epoch(0):
        assert (images[:, 0, 0, 0] * 2.55).round().tolist() == labels.tolist()
