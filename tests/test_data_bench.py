"""The data benchmark: both sides read the same images, and the JSON says it all. Never how fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_files import labels_of, pictures, save_arrays

from reparam.bench import data as bench
from reparam.errors import DataError
from reparam.training.data import load_data

JOBS = [bench.PLAIN, "Batches", "Batches, 1 worker"]


def test_json_holds_every_job() -> None:
    told: list[str] = []
    value = bench.bench_data(None, 30, 16, 4, (0, 1), 2, told.append)
    assert value["what"] == "data"
    assert value["settings"] == {"images": 27, "shape": [3, 16, 16], "batch_size": 4, "repeats": 2}
    assert value["machine"]["torch"] == torch.__version__
    assert [result["name"] for result in value["results"]] == JOBS
    for result in value["results"]:
        assert result["seconds"] > 0
        assert result["images_per_second"] == 27 / result["seconds"]
    assert value["results"][0]["ratio"] == 1.0
    assert told == ["generating 30 JPEG files of 16x16"] + [
        f"repeat {repeat} of 2: {job}" for repeat in (1, 2) for job in JOBS
    ]


def test_both_sides_make_the_same_batches(tmp_path: Path) -> None:
    """As many, of one shape, of pixels of the same images."""
    bench.generate(tmp_path, 30, 16)
    data = load_data(str(tmp_path))
    encoded = bench._encoded(data)
    plain, ours = list(bench._plain(encoded, data, 4)), list(bench._batches(data, 4, 0))
    assert [batch.shape for batch in plain] == [batch.shape for batch in ours] == [(4, 3, 16, 16)] * 6
    assert {batch.dtype for batch in plain + ours} == {torch.float32}
    # The middle of an image survives every crop by two pixels: both hold pixels of the same files.
    known = {
        tuple(pixel)
        for image in data.train.take(range(len(data.train)))[0].permute(0, 2, 3, 1).flatten(1, 2).tolist()
        for pixel in map(tuple, image)
    }
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    for batch in plain + ours:
        middle = ((batch * std + mean) * 255).round()[:, :, 4:12, 4:12].permute(0, 2, 3, 1).reshape(-1, 3)
        assert {tuple(map(int, pixel)) for pixel in middle.tolist()} <= known


def test_arrays_are_no_encoded_images(tmp_path: Path) -> None:
    path = save_arrays(tmp_path / "t.npz", x=pictures(), y=labels_of())
    with pytest.raises(DataError, match="holds no encoded images, which are what is measured"):
        bench.bench_data(str(path), 10, 8, 2, (0,), 1, lambda what: None)
