"""What is found out before the first step: that network and data fit, and what the run will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits
from torch import Tensor, nn
from training_cases import (
    CLASSES,
    FEATURES,
    convolutional,
    geometric,
    labelled,
    measured,
    pictures,
    plain,
    recipe,
    trained,
    values,
)

from reparam.errors import DataError, ReparamError
from reparam.graph import convert
from reparam.layers import Reparameterized
from reparam.training import RunFolder, run_preflight
from reparam.training.data.types import Data
from reparam.training.schedule import Schedule


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


class Answer(nn.Module):
    """Whatever is asked for."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


BAD: dict[str, tuple[nn.Module, Data, str]] = {
    "other inputs": (
        linear(9, 3),
        labelled(),
        "the network does not take inputs of 6, as the data has: mat1 and mat2 shapes",
    ),
    "images": (linear(9, 3), pictures(), "the network does not take inputs of 2x6x6, as the data has: "),
    "too few classes": (linear(6, 2), labelled(), "the network has 2 output(s), the data 3 classes"),
    "too few values": (linear(6, 1), measured(), "the network has 1 output(s), the data 2 value(s) to learn"),
    "too many values": (
        linear(6, 3),
        measured(),
        "the network has 3 output(s), the data 2 value(s) to learn",
    ),
    "a map": (nn.Conv2d(2, 3, 1), pictures(), "the network gives [2, 3, 6, 6], not logits (N, classes)"),
    "a flat answer": (Answer(torch.zeros(2)), labelled(), "the network gives [2], not logits (N, classes)"),
    "no tensor": (Answer({"loss": 1}), labelled(), "the network gives dict, not logits (N, classes)"),
    "nothing": (Answer(None), measured(), "the network gives NoneType, not values (N, 2)"),
    "its own error": (
        Answer(KeyError("pixel_values\nand more")),
        labelled(),
        "the network does not take inputs of 6",
    ),
    "no memory": (
        Answer(torch.OutOfMemoryError("CUDA out of memory")),
        labelled(),
        "out of memory on cpu with 2 sample(s)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    model, data, told = BAD[name]
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ReparamError) as caught:
        run_preflight(model, data, recipe())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(type(caught.value)):
        trained(model, data, recipe(), run.path)
    assert not list(run.path.iterdir())


def test_a_network_that_cannot_be_trained_on_one_sample(tmp_path: Path) -> None:
    """Batch norm takes one in evaluation, where an ordinary preflight looks."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert run_preflight(model, labelled(), recipe(batch_size=8, accumulate=4)).part == 2
    for fields in ({"batch_size": 1}, {"batch_size": 4, "accumulate": 4}):
        with pytest.raises(
            DataError, match="the network cannot be trained on 1 of them at once: Expected more than 1"
        ):
            run_preflight(model, labelled(), recipe(**fields))
        with pytest.raises(DataError, match="cannot be trained on 1 of them"):
            trained(model, labelled(), recipe(**fields), tmp_path / str(len(fields)))


def test_one_sample_to_validate_on_is_enough() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert run_preflight(model, labelled(validation=1), recipe()).memory.activations > 0


def test_more_outputs_than_classes_are_well() -> None:
    assert run_preflight(linear(6, 1000), labelled(), recipe()).outputs == 1000


def test_a_flat_output_is_one_value() -> None:
    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

    assert run_preflight(Flat(6, 1), measured(width=1), recipe()).outputs == 1


def test_groups_steps_and_parts() -> None:
    model = geometric()
    model.get_parameter("3.bias").requires_grad_(False)
    found = run_preflight(model, labelled(), recipe(batch_size=7, accumulate=2, weight_decay=0.5, epochs=3))
    rows = [(g.kind, g.tensors, g.numbers, g.lr, g.weight_decay) for g in found.groups]
    assert rows == [
        ("theta", 1, 8 * (FEATURES - 1), pytest.approx(0.01), 0.0),
        ("r", 1, 8, 0.1, 0.0),
        ("lambda_", 1, 8, 0.1, 0.0),
        ("weight", 1, 8 * CLASSES, 0.1, 0.5),
        ("bias", 1, CLASSES, None, None),
    ]
    assert (found.steps_per_epoch, found.steps, found.batch, found.part) == (3, 9, 7, 4)
    assert (found.inputs, found.outputs, found.device, found.devices) == ((FEATURES,), CLASSES, "cpu", 1)
    assert (found.objective.loss, found.objective.metric) == ("cross_entropy", "accuracy")
    assert run_preflight(model, labelled(), recipe(steps=4)).steps == 4


def test_only_some_kinds_are_trained() -> None:
    model = geometric()
    found = run_preflight(model, labelled(), recipe(train="r"))
    assert {g.kind: g.lr for g in found.groups} == {
        "theta": None,
        "r": 0.1,
        "lambda_": None,
        "weight": None,
        "bias": None,
    }
    assert found.memory.gradients == 8 * 4
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [geometric, convolutional])
def test_the_model_is_left_as_it_was(make: Any) -> None:
    model, data = make(), labelled() if make is geometric else pictures()
    model.train()
    model.get_submodule("0").eval()
    before, modes = values(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    run_preflight(model, data, recipe(ema=0.9))
    assert_same_bits(values(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fields", "moments", "average"),
    [
        ({"momentum": 0}, 0, 0),
        ({"momentum": 0.9}, 1, 0),
        ({"optimizer": "adam"}, 2, 0),
        ({"optimizer": "adamw", "ema": 0.9}, 2, 1),
    ],
)
def test_memory_of_parameters_and_optimizer_is_what_torch_takes(
    fields: dict[str, Any], moments: int, average: int, tmp_path: Path
) -> None:
    from reparam.training import State

    model = plain()
    numbers = sum(p.numel() for p in model.parameters())
    memory = run_preflight(model, labelled(), recipe(**fields)).memory
    assert memory.parameters == memory.gradients == numbers * 4
    assert (memory.optimizer, memory.average) == (moments * numbers * 4, average * numbers * 4)
    trained(model, labelled(), recipe(steps=1, **fields), tmp_path / "run")
    state = State.load(tmp_path / "run" / "state.pt")
    kept = [
        tensor.nbytes
        for of_parameter in state.optimizer["state"].values()
        for key, tensor in of_parameter.items()
        if isinstance(tensor, Tensor) and key != "step"
    ]
    assert sum(kept) == memory.optimizer
    assert sum(t.nbytes for t in state.average.get("values", {}).values()) == memory.average


def test_activations_grow_with_the_part_of_a_batch() -> None:
    """By hand: a linear layer keeps its input, ReLU its output, cross-entropy the log-probabilities and labels."""
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    # The loss keeps its total weight, one number, whatever the batch.
    sample = 4 * (FEATURES + 8 + CLASSES) + 8
    for fields, part in (({"batch_size": 16}, 16), ({"batch_size": 16, "accumulate": 4}, 4)):
        found = run_preflight(model, labelled(), recipe(**fields))
        assert found.part == part
        assert found.memory.activations == sample * part + 4
        assert found.memory.total == sum(vars(found.memory).values())


def test_composed_weights_do_not_grow_with_the_batch() -> None:
    with torch.random.fork_rng(devices=[]):
        model = convert(
            nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 40), nn.Linear(40, 3)), to="gmp"
        )
    four, eight, sixteen = (
        run_preflight(model, labelled(), recipe(batch_size=size)).memory.activations for size in (4, 8, 16)
    )
    assert sixteen - eight == 2 * (eight - four) > 0
    assert four - (eight - four) >= 4 * 8 * 40, "the composed weight of the second layer"
    whole, parts = (
        run_preflight(model, labelled(), recipe(batch_size=8, accumulate=n)).memory for n in (1, 2)
    )
    converted = [m for m in model.modules() if isinstance(m, Reparameterized)]
    held = sum(p.nbytes for layer in converted for p in layer.parameters())
    assert parts.gradients - whole.gradients == held > 0, "gathered on the composed weights"


def test_notes() -> None:
    def notes(model: nn.Module, **fields: Any) -> tuple[str, ...]:
        return run_preflight(model, labelled(), recipe(**fields)).notes

    assert notes(geometric()) == ()
    (told,) = notes(geometric(), angle_lr=0.1)
    assert told.startswith(
        "angles learn at 0.1, plain weights at 0.1: with sgd a step on an angle moves the weight"
    )
    assert told.endswith("try --angle-lr 0.01")
    assert notes(geometric(), lrs="theta=0.2") != ()
    assert notes(geometric(), optimizer="adam") == ()
    idle = ("without effect: --angle-lr 0.1 (no angles are trained)",)
    assert notes(plain(), angle_lr=0.1) == idle
    assert notes(geometric(), angle_lr=0.1, train="r") == idle
    assert notes(plain(), batch_size=30) == ("--batch-size 30: the 22 training samples are one batch",)
    (told,) = notes(plain(), epochs=1, warmup=5)
    assert told == "the warm-up takes 5 steps, the whole run 5: the full rates are not reached"


def test_a_data_error_is_one_of_the_data() -> None:
    with pytest.raises(DataError):
        run_preflight(linear(6, 2), labelled(), recipe())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, ""),
        ({"momentum": 0.8}, ""),
        ({"optimizer": "adam", "momentum": 0.8}, "--momentum 0.8 (the optimizer is adam)"),
        ({"optimizer": "adamw", "betas": "0.8,0.9"}, ""),
        ({"betas": "0.8,0.9"}, "--betas 0.8,0.9 (the optimizer is sgd)"),
        ({"min_lr": 0.01, "schedule": "cosine", "warmup": 2}, ""),
        ({"min_lr": 0.01}, "--min-lr 0.01 (the schedule is constant)"),
        (
            {"patience": 2, "factor": 0.5, "schedule": "cosine"},
            "--patience 2 (the schedule is cosine), --factor 0.5 (the schedule is cosine)",
        ),
        ({"patience": 2, "factor": 0.5, "schedule": "plateau", "min_lr": 0.01}, ""),
        ({"schedule": "plateau", "patience": 3}, "--schedule plateau (it waits 3 epochs, --patience, of 3)"),
        ({"schedule": "plateau"}, "--schedule plateau (it waits 50 epochs, --patience, of 3)"),
        ({"early_stop": 2}, ""),
        ({"early_stop": 3}, "--early-stop 3 (the run has 3 epochs)"),
        ({"early_stop": 3, "steps": 40}, "--epochs 3 (--steps is given)"),
        ({"decay_all": True}, "--decay-all (--weight-decay is 0)"),
        ({"decay_all": True, "weight_decay": 0.1}, ""),
        ({"angle_lr": 0.001}, ""),
    ],
)
def test_options_without_effect_are_named(fields: dict[str, Any], told: str) -> None:
    notes = run_preflight(geometric(), labelled(), recipe(**fields)).notes
    assert notes == ((f"without effect: {told}",) if told else ())


def test_a_plateau_that_is_waited_for_longer_than_named_never_comes() -> None:
    """What the warning rests on: in so many epochs the rates never fall, however bad the values are."""
    for epochs, falls in ((3, False), (5, True)):
        schedule = Schedule("plateau", 100, patience=3)
        for _ in range(epochs):
            schedule.observe(1.0)
        assert (schedule.rate(1.0, 50) < 1) == falls
