"""Random numbers of a run: the seed decides them, every step has its own, and the caller's are left alone."""

from __future__ import annotations

from pathlib import Path

import torch
from support import assert_same_bits
from torch import nn
from training_cases import convolutional, geometric, labelled, pictures, plain, recipe, trained, values


def test_the_same_arguments_give_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    for data, make in ((labelled(), lambda: geometric(dropout=0.3)), (pictures(), convolutional)):
        models = [make(), make(), make()]
        state = torch.get_rng_state()
        for i, (model, seed) in enumerate(zip(models, (0, 0, 1), strict=True)):
            trained(model, data, recipe(seed=seed, lr=0.01), tmp_path / f"{data.shape} {i}")
            torch.rand(1)  # what the caller draws changes nothing
        torch.set_rng_state(state)
        assert_same_bits(values(models[0]), values(models[1]))
        assert not all(
            torch.equal(a, b)
            for a, b in zip(values(models[0]).values(), values(models[2]).values(), strict=True)
        )


def test_the_noise_of_dropout_is_another_in_every_step_and_for_every_seed(tmp_path: Path) -> None:
    """Samples that are all the same and weights that do not move leave nothing but the noise."""
    data, found = labelled(), []
    data.train.inputs[:] = 1.0  # type: ignore[attr-defined]
    for seed in (0, 1):
        model = plain(dropout=0.5)
        nn.init.constant_(model[0].bias, 10.0)  # type: ignore[arg-type]  # ReLU sets none to zero
        model[2].register_forward_hook(
            lambda module, inputs, output: (
                found.append(str((output == 0).tolist())) if output.requires_grad else None
            )
        )
        trained(model, data, recipe(seed=seed, lr=0), tmp_path / str(seed))
    assert len(found) == len(set(found)) == 30


def test_the_callers_random_numbers_are_not_disturbed(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    trained(plain(dropout=0.5), labelled(), recipe(epochs=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
