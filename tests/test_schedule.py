"""Learning rates by step, against torch's schedulers and the formulas; and when to stop."""

from __future__ import annotations

import math

import pytest
import torch

from reparam.training.schedule import EarlyStop, Schedule

EXACT = 1e-14


def rates(schedule: Schedule, steps: range, groups: tuple[float, ...] = (0.1,)) -> list[list[float]]:
    """The rates the schedule sets on an optimizer, by step, one a group."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in groups])
    found = []
    for step in steps:
        schedule.apply(optimizer, step)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def test_warm_up_is_linear_and_below_the_rate() -> None:
    found = rates(Schedule("constant", 10, warmup=4), range(10), (0.1, 0.02))
    expected = [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]
    for k, row in enumerate(found):
        assert row == pytest.approx([0.1 * expected[k], 0.02 * expected[k]], rel=EXACT)


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=0.004)
    found = rates(Schedule("cosine", 15, warmup=3, min_lr=0.004), range(20))
    assert found[:3] == [[pytest.approx(0.1 * k / 4)] for k in (1, 2, 3)]
    for step in range(3, 15):
        assert found[step] == [pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)], step
        optimizer.step()
        oracle.step()
    assert found[14][0] > 0.004  # the last step still moves
    assert found[15:] == [[0.004]] * 5


def test_no_group_rises_above_its_own_rate() -> None:
    found = rates(Schedule("cosine", 10, min_lr=0.01), range(10), (0.1, 0.001))
    assert {row[1] for row in found} == {0.001}
    plateau = Schedule("plateau", 10, min_lr=0.01, patience=1)
    for _ in range(4):
        plateau.observe(1.0)
    assert rates(plateau, range(1), (0.1, 0.001)) == [[0.01, 0.001]]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_plateau_drops_after_epochs_that_were_not_better(better: str) -> None:
    sign = 1 if better == "lower" else -1
    schedule = Schedule("plateau", 100, patience=2, factor=0.5, better=better)
    found = []
    for value in (5.0, 4.0, 4.0, 6.0, 4.0, math.nan, 3.0, 3.5, 3.0):
        schedule.observe(sign * value)
        found.append(schedule.rate(1.0, 7))
    assert found == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_plateau_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    # Theirs waits one epoch longer: it drops at patience + 1.
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=2, threshold=0.0, eps=0.0, min_lr=1e-4
    )
    schedule = Schedule("plateau", 100, patience=3, factor=0.3, min_lr=1e-4)
    for value in torch.rand(80, generator=torch.Generator().manual_seed(0)).tolist():
        schedule.observe(value)
        oracle.step(value)
        assert schedule.rate(0.1, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert schedule.rate(0.1, 50) == 1e-4


def test_only_plateau_takes_notice() -> None:
    for kind in ("constant", "cosine"):
        schedule = Schedule(kind, 10, patience=1)
        before = schedule.rate(0.1, 4)
        for _ in range(5):
            schedule.observe(1.0)
        assert schedule.rate(0.1, 4) == before


def test_early_stop() -> None:
    stop = EarlyStop(2, "higher")
    assert [stop.observe(v) for v in (1.0, 2.0, 2.0, 3.0, math.nan, 3.0)] == [False] * 5 + [True]
    first = EarlyStop(2, "lower")
    assert [first.observe(v) for v in (math.nan, 3.0, 2.0, math.nan, 2.0)] == [False] * 4 + [True]
    never = EarlyStop(None)
    assert not any(never.observe(1.0) for _ in range(50))


def test_resumed_is_undisturbed() -> None:
    """At every epoch: the state of both, through a file, and the optimizer's, which holds the groups' own rates."""
    values = [5.0, 4.0, 4.5, 4.2, 3.0, 3.0, 3.1, 3.2, 2.0, 2.5, 2.4, 2.3]
    for cut in range(len(values)):
        schedules = [Schedule("plateau", 100, warmup=3, patience=2, factor=0.5) for _ in range(2)]
        stops = [EarlyStop(3), EarlyStop(3)]
        optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1) for _ in range(2)]
        for step, value in enumerate(values[:cut]):
            schedules[0].apply(optimizers[0], step)
            schedules[0].observe(value)
            stops[0].observe(value)
        schedules[1].load_state_dict(schedules[0].state_dict())
        stops[1].load_state_dict(stops[0].state_dict())
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        for step, value in enumerate(values[cut:], start=cut):
            for schedule, optimizer in zip(schedules, optimizers, strict=True):
                schedule.apply(optimizer, step)
                schedule.observe(value)
            assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
            assert stops[0].observe(value) == stops[1].observe(value)
