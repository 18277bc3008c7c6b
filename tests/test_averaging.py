"""Averages of parameters: the recurrence, the circle of the last angle, exact zeros, and the model's own values back."""

from __future__ import annotations

import cmath
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reparam.errors import CheckpointError
from reparam.layers import GmPLinear, layer_class
from reparam.training.averaging import Average

DECAY = 0.7


def decays(updates: int, decay: float = DECAY) -> list[float]:
    return [min(decay, (1 + n) / (10 + n)) for n in range(updates)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    return model


def walk(model: nn.Module, seed: int) -> None:
    """Another value for every parameter and floating-point buffer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.1)


def test_the_recurrence_of_parameters_and_running_statistics() -> None:
    model = network()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    average = Average(model, DECAY)
    for n, decay in enumerate(decays(30)):
        walk(model, n)
        model[1].num_batches_tracked += 1
        average.update(model)
        for key, value in model.state_dict().items():
            expected[key] = (
                decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value
            )
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with average.swapped(model):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-14)
        assert int(model[1].num_batches_tracked) == 30
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_own_values_come_back_whatever_happens_inside() -> None:
    model = network()
    average = Average(model, DECAY)
    walk(model, 0)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())

    def evaluate() -> None:
        with average.swapped(model):
            walk(model, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def last_angles(values: list[float], dtype: torch.dtype = torch.float64) -> GmPLinear:
    layer = GmPLinear.from_plain(nn.Linear(3, len(values)).to(dtype))
    set_last(layer, values)
    return layer


def set_last(layer: GmPLinear, values: list[float]) -> None:
    with torch.no_grad():
        layer.theta[:, -1] = torch.tensor(values, dtype=layer.theta.dtype)


def averaged(average: Average, layer: GmPLinear) -> Tensor:
    with average.swapped(layer):
        return layer.theta.detach().clone()


def test_the_last_angle_takes_the_shorter_arc() -> None:
    """Against complex numbers: the point a share of the way along the arc, wherever the steps have led the angle."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(200, generator=generator, dtype=torch.float64) - 0.5) * 2 * math.pi
    layer = last_angles(values.tolist())
    average = Average(layer, DECAY)
    expected = [cmath.exp(1j * v) for v in values.tolist()]
    for n, decay in enumerate(decays(12)):
        values = values + torch.randn(200, generator=generator, dtype=torch.float64) * 2
        set_last(layer, values.tolist())
        average.update(layer)
        for k, value in enumerate(values.tolist()):
            arc = cmath.phase(cmath.exp(1j * value) / expected[k])
            expected[k] *= cmath.exp(1j * (1 - decay) * arc)
        found = averaged(average, layer)[:, -1]
        assert bool(((found > -math.pi) & (found <= math.pi)).all())
        angles = torch.tensor([cmath.phase(e) for e in expected], dtype=torch.float64)
        apart = torch.remainder(found - angles + math.pi, 2 * math.pi) - math.pi
        assert float(apart.abs().max()) <= 1e-12, n


def test_the_mean_of_3_and_minus_3_is_pi() -> None:
    layer = last_angles([3.0, -3.0, 0.5])
    average = Average(layer, 0.0)  # n = 0: d = 0
    set_last(layer, [-3.0, 3.0, 0.7])
    average.decay = 0.5
    average._updates = 10**9
    average.update(layer)
    found = averaged(average, layer)[:, -1]
    torch.testing.assert_close(
        found.abs(), torch.tensor([math.pi, math.pi, 0.6], dtype=torch.float64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_turns_of_both_signs_are_one_angle(dtype: torch.dtype) -> None:
    half = float(torch.tensor(math.pi, dtype=dtype))
    layer = last_angles([-half, half, half, -half], dtype)
    average = Average(layer, DECAY)
    assert averaged(average, layer)[:, -1].tolist() == [half] * 4
    set_last(layer, [half, -half, -half, -half])
    average.update(layer)
    assert averaged(average, layer)[:, -1].tolist() == [half] * 4


def test_other_angles_are_no_circle() -> None:
    layer = last_angles([0.1])
    with torch.no_grad():
        layer.theta[0, 0] = 3.0
    average = Average(layer, DECAY)
    with torch.no_grad():
        layer.theta[0, 0] = -3.0
    average.update(layer)
    assert float(averaged(average, layer)[0, 0]) == pytest.approx(0.1 * 3.0 + 0.9 * -3.0, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeros", [[0], [1], [4], [0, 2], [3, 4], [1, 2, 3], [0, 1, 2, 3]])
def test_zeros_of_pruned_weights_stay(dtype: torch.dtype, zeros: list[int]) -> None:
    """Weights of both signs, every angle that means an exact zero held still, everything else moving."""
    torch.manual_seed(0)
    plain = nn.Linear(5, 40).to(dtype)
    with torch.no_grad():
        plain.weight[:, zeros] = 0
    layer = GmPLinear.from_plain(plain)
    still = layer.theta.detach().clone()
    exact = (still.abs() == still.new_tensor(math.pi / 2)) | (still == 0)
    exact[:, -1] |= still[:, -1].abs() == still.new_tensor(math.pi)
    average = Average(layer, 0.9)
    for n in range(20):
        walk(layer, n)
        with torch.no_grad():
            flipped = torch.where(still.abs() == still.new_tensor(math.pi), (-1) ** n * still, still)
            layer.theta.copy_(torch.where(exact, flipped, layer.theta))
        average.update(layer)
    with average.swapped(layer):
        weight = layer.weight.detach()
        assert not weight[:, zeros].any()
        kept = [k for k in range(5) if k not in zeros]
        assert bool((weight[:, kept] != 0).all())
        assert not torch.equal(weight, plain.weight)
        assert not layer.fold().weight[:, zeros].any()


def test_angles_stored_in_float32_keep_their_zeros_in_float64() -> None:
    """Decoding knows π as rounded where theta was stored, whatever it is held in later."""
    plain = nn.Linear(2, 1)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[0.0, -2.0]]))
    layer = GmPLinear.from_plain(plain).double()
    average = Average(layer, DECAY)
    average.update(layer)
    with average.swapped(layer):
        first, second = layer.weight.tolist()[0]
        assert first == 0.0
        assert second == pytest.approx(-2.0, rel=1e-14)


def test_sixteen_bit_parameters_are_averaged_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = Average(model, 0.99)
    with torch.no_grad():
        model.weight.fill_(1.0 + 2**-7)
    average._updates = 10**9
    for _ in range(60):  # each a hundredth of the last bit
        average.update(model)
    with average.swapped(model):
        assert float(model.weight.detach()) == 1.0
    for _ in range(60):
        average.update(model)
    with average.swapped(model):
        assert model.weight.dtype == torch.bfloat16
        assert float(model.weight.detach()) == 1.0 + 2**-7


def test_masks_of_infinity_and_what_no_state_dict_holds() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    model = Masked()
    average = Average(model, DECAY)
    model.cache.fill_(5.0)
    average.update(model)
    with average.swapped(model):
        assert model.mask.tolist() == [0.0, -math.inf]
        assert model.cache.tolist() == [5.0, 5.0]


def test_running_input_means_are_averaged() -> None:
    layer = layer_class("gmp", nn.Linear).from_plain(nn.Linear(4, 3)).normalize_mean("mn")
    average = Average(layer, DECAY)
    layer.running_input_mean.fill_(1.0)
    average.update(layer)
    with average.swapped(layer):
        torch.testing.assert_close(layer.running_input_mean, torch.full((4,), 0.9), rtol=1e-6, atol=0)
    assert layer.running_input_mean.tolist() == [1.0] * 4


def test_resumed_is_undisturbed(tmp_path: Path) -> None:
    model = network()
    average = Average(model, 0.9)
    for n in range(5):
        walk(model, n)
        average.update(model)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    resumed = Average(network(), 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for n in range(5, 9):
        walk(model, n)
        for one in (average, resumed):
            one.update(model)
    found, expected = resumed.state_dict(), average.state_dict()
    assert found["updates"] == expected["updates"] == 9
    assert all(torch.equal(value, expected["values"][key]) for key, value in found["values"].items())
    with pytest.raises(CheckpointError, match=r"of another model: `0\.bias` differs"):
        Average(nn.Sequential(nn.Linear(3, 3)), 0.9).load_state_dict(found)
