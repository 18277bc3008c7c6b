"""Element types in training: bf16 and fp16 compute narrow, parameters and angles stay wide."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_cases import geometric, labelled, recipe, trained

from reparam.training.distributed import World
from reparam.training.objective import Objective
from reparam.training.precision import Precision
from reparam.training.stepping import Stepper


def test_bf16_computes_narrow_and_keeps_angles_wide(tmp_path: Path) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.add((output.dtype, model.get_parameter("0.theta").dtype))

    model = geometric().bfloat16()
    model.register_forward_hook(look)
    result = trained(model, labelled(), recipe(amp="bf16", lr=0.05), tmp_path / "run")
    assert seen == {(torch.bfloat16, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.best.loss < result.before.loss


def test_a_float64_angle_stays_so(tmp_path: Path) -> None:
    model = geometric()
    with torch.no_grad():
        layer = model.get_submodule("0")
        layer.theta = nn.Parameter(layer.theta.double())  # type: ignore[union-attr, operator]
    trained(model, labelled(), recipe(epochs=1), tmp_path / "run")
    assert model.get_parameter("0.theta").dtype == torch.float64
    assert model.get_parameter("0.r").dtype == torch.float32


def test_fp16_leaves_out_a_step_whose_gradient_is_too_large_for_it() -> None:
    """The loss is scaled up until gradients overflow, down again when they do; weights only follow finite ones."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    objective = Objective("regress", "mse", "rmse", 1)
    precision = Precision(torch.device("cpu"), torch.float32, torch.float16)
    stepper = Stepper(
        model,
        model,
        optimizer,
        scaler,
        objective,
        precision,
        World(0, 1, torch.device("cpu")),
        samples=1,
        clip=9.0,
    )
    # The gradient of (w·2 − 6)² is 4·(2w − 6), −16 at w = 1; times 2¹²⁷ it is beyond float32.
    inputs, targets = torch.full((1, 1), 2.0), torch.full((1, 1), 6.0)
    first = stepper.take(inputs, targets)
    assert (first.loss, first.trouble, model.weight.item()) == (16.0, "", 1.0)
    assert scaler.get_scale() == 2.0**126
    while scaler.get_scale() > 2.0**8:  # fp16's largest number is 65504
        stepper.take(inputs, targets)
        if model.weight.item() != 1.0:
            break
    assert model.weight.item() == pytest.approx(1.0 + 0.25 * 9.0, rel=1e-6), (
        "clipped after the scale is taken out"
    )
    # With hardly any scale left, a gradient that is not finite is not the type's fault.
    scaler.update(2.0**-11)
    model.weight.register_hook(lambda grad: grad * math.inf)
    assert stepper.take(inputs, targets).trouble == "the norm of the gradient is inf"
