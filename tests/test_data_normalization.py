"""Mean and standard deviation of inputs: measured on the training part, given, or left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    LABELS,
    PICTURES,
    everything,
    image_parquet,
    labels_of,
    numbers,
    pictures,
    save_arrays,
    whole,
)

from reparam.training.data import load_data, normalize


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


def test_integers_stay_integers_without_normalization(tmp_path: Path) -> None:
    tokens = np.arange(24).reshape(12, 2)
    path = str(save_arrays(tmp_path / "t.npz", x=tokens, y=LABELS))
    data = load_data(path, normalize=False)
    assert torch.equal(whole(data)[0], torch.from_numpy(tokens))
    assert data.mean == ()
