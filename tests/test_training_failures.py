"""Training that goes wrong, by values that are not finite or for want of memory: what is told and what is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, tensors_of
from torch import Tensor, nn
from training_cases import geometric, labelled, measured, plain, recipe, trained, values

from reparam.errors import CheckFailedError, ReparamError
from reparam.training import RunFolder, StepEvent


def test_divergence_names_the_rates_and_keeps_the_best(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path / "run"), geometric()
    with pytest.raises(CheckFailedError) as caught:
        trained(model, labelled(), recipe(lr=1e30), run.path)
    assert not model.training
    told = str(caught.value)
    assert "training diverged at step 2: the loss is" in told
    assert "lower --angle-lr (now 1e+29) or --lr (now 1e+30)" in told
    assert told.endswith(f"the last good checkpoint is {run.best}, of step 0")
    assert_same_bits(tensors_of(run.best), values(geometric()))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(run.last).values())


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * math.inf

    class Cliff(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Cliff.calls += self.training  # the preflight once, and every step
            return Steep.apply(x) if Cliff.calls == 8 else x  # type: ignore[no-any-return, no-untyped-call]

    model = nn.Sequential(plain(), Cliff())
    losses: list[Any] = []
    with pytest.raises(CheckFailedError, match=r"diverged at step 7: the norm of the gradient is (nan|inf)"):
        trained(model, labelled(), recipe(), tmp_path / "run", tell=losses.append)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert max(event.step for event in losses if isinstance(event, StepEvent)) == 6


def test_a_validation_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Rots(nn.Module):
        evaluations = 0

        def forward(self, x: Tensor) -> Tensor:
            Rots.evaluations += not self.training
            return x * math.nan if Rots.evaluations > 3 and not self.training else x

    # Two forward passes to begin with: the preflight and the first evaluation, in three batches of four.
    with pytest.raises(CheckFailedError, match="the validation loss is nan before the first step"):
        trained(nn.Sequential(plain(), Rots()), labelled(), recipe(), tmp_path / "first")
    assert not RunFolder(tmp_path / "first").state.exists()
    Rots.evaluations = -1
    with pytest.raises(
        CheckFailedError, match=r"diverged at step 5: the validation loss is nan: lower --lr \(now"
    ):
        trained(nn.Sequential(plain(), Rots()), labelled(), recipe(), tmp_path / "later")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run, data = RunFolder(tmp_path / "run"), measured()
    data.train.targets.mul_(1000)  # type: ignore[attr-defined]
    with pytest.raises(CheckFailedError, match="diverged at step 1: a parameter is not finite"):
        trained(plain(2), data, recipe(lr=3e38, momentum=0, save_every=1), run.path)
    assert_same_bits(tensors_of(run.last), values(plain(2)))


class Small:
    """A device that holds the activations of so many samples."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and len(args[0]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nand more")


@pytest.mark.parametrize(
    ("fields", "room", "told"),
    [
        (
            {},
            4,
            "out of memory on cpu with 16 samples at once: 4 fit: --accumulate 4 takes the same steps in parts",
        ),
        ({"accumulate": 2}, 7, "with 8 samples at once: 4 fit: --accumulate 4 takes"),
        (
            {"batch_size": 13},
            4,
            "with 13 samples at once: 3 fit: --accumulate 5 takes the same steps in parts, --batch-size 3",
        ),
        ({}, 0, "with 16 samples at once, and with one: this network needs a larger device"),
    ],
)
def test_out_of_memory_says_what_fits(fields: dict[str, Any], room: int, told: str, tmp_path: Path) -> None:
    model = plain()
    model.register_forward_pre_hook(Small(room))
    with pytest.raises(ReparamError) as caught:
        trained(model, labelled(), recipe(**{"batch_size": 16, **fields}), tmp_path / "run")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, CheckFailedError)
    assert all(p.grad is None for p in model.parameters())


def test_the_advice_on_memory_is_right(tmp_path: Path) -> None:
    model = plain()
    model.register_forward_pre_hook(Small(3))
    trained(model, labelled(), recipe(batch_size=13, accumulate=5), tmp_path / "run")


def test_a_cpu_that_is_full_and_another_error(tmp_path: Path) -> None:
    def full(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you"
            )

    def broken(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("a defect of the network")

    for hook, kind, told in (
        (full, ReparamError, "out of memory on cpu"),
        (broken, RuntimeError, "a defect"),
    ):
        model = plain()
        model.register_forward_pre_hook(hook)
        with pytest.raises(kind, match=told):
            trained(model, labelled(), recipe(), tmp_path / told)
