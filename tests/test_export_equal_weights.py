"""Weights of one number, which no value tells from a constant: a PReLU's slope, a scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from reparam.export import export_onnx_model
from reparam.export import onnx as onnx_export
from reparam.graph import parse_spec
from reparam.onnxfile.reading import read_initializers
from reparam.onnxfile.weight_map import KEY, WeightMap
from reparam.verification import verify_onnx


class Scaled(nn.Module):
    """A parameter of one number beside a constant of the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor([[0.25]]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) * 0.25).tanh() * self.scale.reshape(1, 1, 1).reshape(1, 1)


class Shared(nn.Module):
    """One slope under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(4, 4), nn.PReLU()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.fc(self.first(x)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one slope": (lambda: nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 3)), "N,4"),
    "behind a convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU()), "N,2,6,6"),
    "two": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.PReLU(init=0.5), nn.Linear(8, 2)
        ),
        "N,4",
    ),
    "beside a constant": (Scaled, "N,4"),
    "under two names": (Shared, "N,4"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_is_found_and_a_wrong_one_seen(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, spec = NETWORKS[name]
    model, specs, path = make().eval(), [parse_spec(spec)], tmp_path / "model.onnx"
    found = export_onnx_model(model, specs, path).found
    assert found.uncovered == ()
    assert found.ambiguous == {}
    told = {key for source in found.weights.sources.values() for key in source.keys}
    state = model.state_dict()
    assert len(told) == len(list(model.parameters()))  # a tied one once
    assert {state[key].data_ptr() for key in told} == {p.data_ptr() for p in model.parameters()}
    assert verify_onnx(model, model, path, specs, found.weights).passed
    file = onnx.load(path)
    assert WeightMap.load(next(p.value for p in file.metadata_props if p.key == KEY)) == found.weights
    # Which one it is, is told right: with another weight under one key the file must be found wrong there.
    key = next(key for key in sorted(told) if state[key].numel() == 1)
    other = make().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.get_parameter(key).add_(0.5)
    report = verify_onnx(other, other, path, specs, found.weights)
    wrong = [check for check in report.proof("weights") if not check.passed]
    assert len(wrong) == 1
    assert key in str(wrong[0])
    assert read_initializers(path).keys() >= found.weights.sources.keys()


def test_a_second_export_is_made_for_them_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as the first."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("exported twice")

    monkeypatch.setattr(onnx_export, "second_export", refuse)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(3), nn.LeakyReLU()).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([0.1, 0.2, 0.3]))
    found = export_onnx_model(model, [parse_spec("N,2,6,6")], tmp_path / "model.onnx").found
    assert found.uncovered == ("1.num_batches_tracked",)
