"""``file.py:callable``: a Dataset of the user's own, or a pair of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reparam.errors import DataError
from reparam.training.data import Augment, Batches, load_data
from reparam.training.data.split import Subset

HEAD = """
import random
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

class Items(Dataset):
    def __init__(self, make, count=8, **attributes):
        self.make, self.count = make, count
        vars(self).update(attributes)
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.make(index)
"""


def ref(folder: Path, expression: str) -> str:
    (folder / "mine.py").write_text(f"{HEAD}\ndef data():\n    return {expression}\n")
    return f"{folder / 'mine.py'}:data"


def test_a_dataset_for_classification(tmp_path: Path) -> None:
    data = load_data(ref(tmp_path, "Items(lambda i: (torch.full((3,), i / 2), i % 4))"), validation=0.5)
    assert (data.task, data.classes, data.targets, data.shape) == ("classify", ("0", "1", "2", "3"), 4, (3,))
    assert (data.mean, data.std) == ((), ())
    assert isinstance(data.train, Subset)
    inputs, targets = data.train.samples.take(range(8))
    assert inputs[:, 0].tolist() == [i / 2 for i in range(8)]
    assert (targets.dtype, targets.tolist()) == (torch.int64, [0, 1, 2, 3] * 2)
    # Labels were counted, so that the split has each of them once.
    assert sorted(data.validation.take(range(4))[1].tolist()) == [0, 1, 2, 3]
    assert data.train.samples.place(5) == f"{tmp_path / 'mine.py'}:data[5]"
    for word in ("task: classify", "reading all 8 items", "taken as they are"):
        assert any(word in note for note in data.notes)


def test_names_of_classes_save_the_counting(tmp_path: Path) -> None:
    data = load_data(
        ref(tmp_path, "Items(lambda i: (torch.ones(2), i % 2), classes=['a', 'b', 'c'])"), validation=0.5
    )
    assert (data.classes, data.targets) == (("a", "b", "c"), 3)
    assert not any("reading all" in note for note in data.notes)


def test_a_pair_and_regression(tmp_path: Path) -> None:
    pair = "TensorDataset(torch.rand(6, 2), torch.rand(6, 3)), Items(lambda i: (np.ones(2), np.full(3, i / 4)), 4)"
    data = load_data(ref(tmp_path, pair))
    assert (data.task, data.classes, data.targets, len(data.train), len(data.validation)) == (
        "regress",
        (),
        3,
        6,
        4,
    )
    inputs, targets = data.validation.take([1, 2])
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.float32)
    assert targets.tolist() == [[0.25] * 3, [0.5] * 3]
    # What the callable draws is seeded.
    again = load_data(ref(tmp_path, pair))
    assert torch.equal(data.train.take([0])[0], again.train.take([0])[0])
    other = load_data(ref(tmp_path, pair), seed=1)
    assert not torch.equal(data.train.take([0])[0], other.train.take([0])[0])


@pytest.mark.parametrize(
    ("item", "task", "value"),
    [("(torch.ones(1), 3.5)", "regress", 3.5), ("(torch.ones(1), torch.tensor(2))", "classify", 2),
     ("[1.0, np.int64(1)]", "classify", 1), ("(torch.ones(1), np.float32(0.5))", "regress", 0.5)],
)  # fmt: skip
def test_kinds_of_targets(tmp_path: Path, item: str, task: str, value: float) -> None:
    data = load_data(ref(tmp_path, f"Items(lambda i: {item})"), validation=0.5)
    assert data.task == task
    assert data.train.take([0])[1].reshape(-1).tolist() == [value]


def test_an_integer_may_be_a_value(tmp_path: Path) -> None:
    data = load_data(ref(tmp_path, "Items(lambda i: (torch.ones(1), i))"), task="regress", validation=0.5)
    assert (data.task, data.targets) == ("regress", 1)


def test_images_are_scaled_and_normalized(tmp_path: Path) -> None:
    """Pillow's images and bytes in the shape of one are pixels."""
    for image in (
        "Image.new('RGB', (5, 4), (i, 2 * i, 3 * i))",
        "torch.tensor([i, 2 * i, 3 * i], dtype=torch.uint8)[:, None, None].expand(3, 4, 5)",
    ):
        data = load_data(ref(tmp_path, f"Items(lambda i: ({image}, 0))"), validation=0.5)
        assert data.shape == (3, 4, 5)
        chosen = data.train.take(range(4))[0].double()[:, :, 0, 0] / 255
        assert chosen[:, 1].tolist() == (2 * chosen[:, 0]).tolist()
        assert torch.allclose(torch.tensor(data.mean).double(), chosen.mean(0), rtol=0, atol=1e-8)
    grey = load_data(ref(tmp_path, "Items(lambda i: (Image.new('L', (5, 4), i), 0))"), validation=0.5)
    assert grey.shape == (1, 4, 5)


RANDOM = "Items(lambda i: (torch.rand(1) + np.random.rand() + random.random() + 10 * i, 0), 12)"


def test_random_datasets_are_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    """Whoever reads a sample, its own random numbers are the same: workers, ranks, a resumed run."""
    data = load_data(ref(tmp_path, RANDOM), validation=0.25)

    def read(epoch: int = 0, start: int = 0, **options: int) -> torch.Tensor:
        batches = Batches(data, data.train, batch_size=4, shuffle=True, **options)
        return torch.cat([inputs for inputs, _ in batches.epoch(epoch, start)]).flatten()

    expected = read()
    state = torch.get_rng_state()
    assert torch.equal(read(), expected)
    assert torch.equal(read(workers=2), expected)
    assert torch.equal(read(start=1), expected[4:])
    ranks = [read(rank=rank, world=2).reshape(-1, 2) for rank in range(2)]
    assert torch.equal(torch.cat(ranks, 1).flatten(), expected)
    assert torch.equal(torch.get_rng_state(), state)
    # Another epoch, other numbers; no two samples alike.
    fractions = [set((values % 10).tolist()) for values in (expected, read(epoch=1))]
    assert len(fractions[0]) == 8
    assert not fractions[0] & fractions[1]


def test_augmentation_of_own_images(tmp_path: Path) -> None:
    data = load_data(
        ref(tmp_path, "Items(lambda i: (Image.new('L', (5, 4), 9), 0), 8)"), validation=0.5, normalize=False
    )
    batch, _ = next(Batches(data, data.train, batch_size=4, shuffle=True, augment=Augment(crop=2)).epoch(0))
    assert batch.shape == (4, 1, 4, 5)
    assert 0 < float((batch == 0).float().mean()) < 0.9


CASES = {
    "no such name": ("None", "mine.py` has no `other`"),
    "it raises": ("1 / 0", "`data` raised ZeroDivisionError: division by zero"),
    "no dataset": ("7", "returned a int; expected a Dataset with __len__"),
    "a mapping": ("{'train': 1}", "returned a dict; expected a Dataset"),
    "an iterable": ("iter([])", "expected a Dataset with __len__ and __getitem__, or a pair"),
    "no items": ("[]", "returned a dataset without items"),
    "no pair": ("Items(lambda i: torch.ones(2))", r"data\[0\] is a Tensor; expected \(input, target\)"),
    "three": ("Items(lambda i: (1, 2, 3))", r"data\[0\] is a tuple of 3; expected"),
    "words": ("Items(lambda i: ('a', 1))", r"data\[0\]: the input is a str; expected numbers"),
    "a label in words": ("Items(lambda i: (torch.ones(1), 'a'))", r"data\[0\]: the target is a str; expected numbers"),
    "an item raises": ("Items(lambda i: (torch.ones(1), [0][i]))", r"data\[1\] raised IndexError: list index out of range"),
    "NaN": ("Items(lambda i: (torch.tensor([0.0 if i < 3 else np.nan]), 0))", r"data\[3\]: the input holds NaN or Inf"),
    "an infinite target": ("Items(lambda i: (torch.ones(1), np.inf))", r"data\[0\]: the target is float32 \[\]; expected a finite"),
    "a negative label": ("Items(lambda i: (torch.ones(1), i - 2))", r"data\[0\]: label -2 is out of range \(from 0 up\)"),
    "a fraction among labels": ("Items(lambda i: (torch.ones(1), 1 if i < 5 else 1.5))", r"data\[5\]: the target is float32 \[\]; a label"),
    "too few names": ("Items(lambda i: (torch.ones(1), i), classes=['a', 'b'])", r"label [2-7] is out of range \(0 to 1\)"),
    "shapes": ("Items(lambda i: (torch.ones(1 + i // 4), 0), classes=['a'])", r"data\[\d\]: the input is float32 \[\d\], (that of|in training)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_item(tmp_path: Path, case: str) -> None:
    expression, message = CASES[case]
    where = ref(tmp_path, expression)
    if case == "no such name":
        where = where.replace(":data", ":other")

    def read() -> None:
        data = load_data(where, validation=0.5)
        for split in (data.train, data.validation):
            list(Batches(data, split, batch_size=4, shuffle=False).epoch(0))

    with pytest.raises(DataError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [{"inputs": "a"}, {"target": "a"}, {"size": 4}, {"val_path": "x"}])
def test_options_that_do_not_go_with_it(tmp_path: Path, option: dict[str, object]) -> None:
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(DataError, match=f"--{name}: does not go with --data"):
        load_data(ref(tmp_path, "[]"), **option)
