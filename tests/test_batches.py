"""A sample without a batch, where a network flattens by positive axes: computed right, or refused; never wrong.

(C, H, W) becomes (C, H·W) under flatten(1), where a batch (N, C, H, W) becomes (N, C·H·W): the columns that follow belong
to positions in space then, not to the units. Here both fit the same linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import why
from torch import Tensor, nn
from torch.nn import functional as F

from reparam import Outcome, ReparamError, convert, fold, load_state_dict, save_state_dict
from reparam.graph import apply_records, load_into, records_of
from reparam.layers import Reparameterized

#: (3, 2, 4, 2) and (2, 2, 8) behind the convolution: 16 features both
BATCH, SAMPLE = noise(3, 1, 6, 4), noise(1, 4, 10)

FLATTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten(1)": lambda y: y.flatten(1),
    "torch.flatten": lambda y: torch.flatten(y, start_dim=1),
    "view": lambda y: y.view(y.size(0), -1),
    "reshape by shape": lambda y: torch.reshape(y, (y.shape[0], -1)),
}


def net(flatten: Callable[[Tensor], Tensor] = FLATTEN["flatten(1)"]) -> nn.Module:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(flatten(F.relu(self.conv(x))))

    return randomized(Flat())


def negative(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.conv.r[0] *= -1
    return model


@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("options", [{"to": "unit"}, {"to": "gmp"}], ids=["unit norm", "scale outside"])
def test_one_sample_is_refused_where_scales_move_past_a_flattening(
    options: dict[str, Any], flatten: str, tmp_path: Path
) -> None:
    plain = net(FLATTEN[flatten])
    assert plain(BATCH).shape == (3, 3)
    assert plain(SAMPLE).shape == (2, 3)
    model = convert(plain, **options)
    save_state_dict(model.state_dict(), records_of(model), tmp_path / "m.safetensors")
    tensors, records = load_state_dict(tmp_path / "m.safetensors")
    read = apply_records(net(FLATTEN[flatten]), records)
    load_into(read, tensors, "file")
    for one in (model, read.eval()):
        assert difference(one, plain, BATCH) <= EXACT
        with pytest.raises(
            ReparamError, match=r"Conv2d was given one sample \[1, 4, 10\].*give it a batch"
        ) as caught:
            one(SAMPLE)
        assert "\n" not in str(caught.value)


def test_signs_move_on_only_where_a_batch_is_sure() -> None:
    model = negative(convert(net()))
    report: list[Outcome] = []
    folded = fold(model, report)
    assert "pushed into `fc`" in why(report, "conv")
    assert difference(folded, model, BATCH) <= EXACT
    # made before layers refused a sample without a batch
    model.conv.batched_only = False
    folded = fold(model, report := [])
    assert "one multiplication remains, `fc` takes its units behind a flattening that needs a batch" in why(
        report, "conv"
    )
    for x in (BATCH, SAMPLE):
        assert difference(folded, model, x) <= EXACT


@pytest.mark.parametrize("options", [{"to": "wn"}, {"to": "gmp", "scale": "inside"}, {"to": "gmp", "mean_norm": True, "scale": "inside"}])  # fmt: skip
def test_where_no_scale_moves_both_are_taken(options: dict[str, Any]) -> None:
    plain = net()
    model = convert(plain, **options)
    for x in (BATCH, SAMPLE):
        assert difference(model, plain, x) <= EXACT
        assert difference(fold(model), plain, x) <= EXACT


def test_where_nothing_flattens_by_positive_axes_both_are_taken() -> None:
    plain = randomized(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(-3), nn.Linear(16, 3)))
    for to in ("unit", "gmp"):
        model = convert(plain, to)
        layer = model.get_submodule("0")
        assert isinstance(layer, Reparameterized)
        assert not layer.batched_only
        for x in (BATCH, noise(1, 6, 4)):
            assert difference(model, plain, x) <= EXACT


def test_the_folded_layer_is_the_plain_one() -> None:
    folded = fold(convert(net()))
    assert vars(folded.conv).keys() == vars(net().conv).keys()
