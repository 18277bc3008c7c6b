"""``reparam.convert`` where it must refuse, or nearly had to: errors in one line, and the classic traps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, randomized
from model_cases import Net, X, converted, net
from scale_oracle import sequential, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from reparam import Outcome, ReparamError, convert, fold
from reparam.errors import NonFiniteError
from reparam.graph.rewritten import Rewritten


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "bn"}, "to 'bn': one of sp, wn, gmp, unit"),
        ({"scale": "left"}, "scale 'left': outside or inside"),
        ({"mean_norm": "max"}, "mean_norm 'max': mn or mbn"),
        ({"to": "sp", "mean_norm": True}, "plain weights have none"),
        ({"calibrate": [X]}, "ask for that too"),
        ({"mean_norm": True, "momentum": 99}, "momentum 99: from 0"),
        ({"mean_norm": True, "calibrate": []}, "calibration has no data"),
        ({"mean_norm": True, "calibrate": ["x"]}, "calibration: a batch is a str"),
        ({"include": ["conv1", "fc*"]}, "include fc*: matches no layer (there are conv1, conv2, up, …)"),
        ({"exclude": ["Conv1"]}, "exclude Conv1: matches no layer"),
        ({"exclude": ["*"]}, "nothing of Net can be converted to gmp: conv1: exclude *; conv2: exclude *"),
        ({"to": "unit", "include": ["conv1"]}, "conv1: `bn1` (BatchNorm2d) takes its output: fold batch norm first"),
        ({"to": "unit", "include": ["head"]}, "head: its output leaves the network"),
    ],
)  # fmt: skip
def test_errors_are_one_line(options: dict[str, Any], message: str) -> None:
    plain = net()
    before = tensors(plain)
    with pytest.raises(ReparamError) as caught:
        convert(plain, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("to", ["gmp", "wn", "unit"])
def test_values_that_are_no_numbers(to: str) -> None:
    plain = sequential(a=nn.Linear(3, 3), act=nn.ReLU(), b=nn.Linear(3, 2))
    with torch.no_grad():
        plain.a.weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        convert(plain, to)
    assert "`a`" in str(caught.value)
    assert "\n" not in str(caught.value)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.act, self.head = nn.LSTM(2, 4, 2), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.lstm(x.flatten(1).reshape(9, -1, 2))[0]))


#: how the network runs -> (rule, layer) -> part of why it was refused
TRAPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[tuple[str, str], str]]] = {
    "dropout between": (
        lambda m, x: m.conv2(F.relu(m.bn1(m.drop(m.conv1(x))))).mean((2, 3)),
        {("fold batch norm", "bn1"): "dropout `drop` (Dropout) stands between"},
    ),
    "branch before batch norm": (
        lambda m, x: m.conv2(m.bn1(y := m.conv1(x)) + y).mean((2, 3)),
        {("fold batch norm", "bn1"): "the output of `conv1` (Conv2d) is also taken by `add`"},
    ),
    "convolution called twice": (
        lambda m, x: m.up(m.bn2(m.conv2(F.relu(m.conv2(F.relu(m.bn1(m.conv1(x)))))))),
        {
            ("fold batch norm", "bn2"): "`conv2` is called 2 times",
            ("place scale", "conv2"): "the layer is called 2 times",
        },
    ),
    "ReLU6": (
        lambda m, x: m.conv2(F.relu6(m.bn1(m.conv1(x)))),
        {("place scale", "conv1"): "relu6 follows it, which is no positively homogeneous activation"},
    ),
    "in-place and functional": (
        lambda m, x: m.head(F.relu(m.up(m.act(m.bn2(m.conv2(torch.relu_(m.bn1(m.conv1(x)))))))).mean((2, 3))),
        {
            ("mean normalization", "up"): "transposed",
            ("swap", "head"): "output layer",
        },
    ),
    "residual": (
        lambda m, x: m.up(F.relu(m.conv2(y := F.relu(m.bn1(m.conv1(x)))) + y)),
        {("place scale", "conv2"): "add follows it"},
    ),
    "transposed": (
        lambda m, x: m.conv2(torch.cat([F.relu(m.up(m.conv1(x)))] * 2, 1)[:, :4]),
        {("mean normalization", "up"): "under a transposed convolution a shift of the input depends on the position"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap: str, memory: torch.memory_format) -> None:
    run, refused = TRAPS[trap]
    plain, x, report = net(run).to(memory_format=memory), X.to(memory_format=memory), list[Outcome]()
    model = convert(plain, fold_bn=True, mean_norm=True, calibrate=[x + 1], report=report)
    assert difference(model, plain, x) <= EXACT
    assert difference(fold(model), plain, x) <= EXACT
    found = {(o.rule, o.layer): o.why for o in report if not o.applied}
    for where, reason in refused.items():
        assert reason in found[where], found
    if trap == "in-place and functional":
        assert found.keys() == refused.keys()
    for converted_too in (convert(plain, "wn", fold_bn=True, mean_norm=True), convert(plain, scale="inside")):
        assert difference(converted_too, plain, x) <= EXACT
        assert type(converted_too) is Net
        assert converted_too(x).is_contiguous(memory_format=memory) == plain(x).is_contiguous(
            memory_format=memory
        )


def test_recurrent_layers() -> None:
    plain, report = randomized(Recurrent()), list[Outcome]()
    for to, kind, reason in (("gmp", "mn", None), ("wn", "mbn", "feed its next step")):
        model = convert(plain, to, mean_norm=kind, calibrate=[X], report=report)
        assert converted(model) == {"lstm"}
        assert difference(model, plain, X) <= EXACT
        assert (model.lstm.mean is None) == (reason is not None)
        if reason:
            assert any(reason in o.why for o in report if not o.applied)
        else:
            assert model.lstm.running_input_mean.shape == (2,)
        assert type(fold(model).lstm) is nn.LSTM


def test_the_class_that_comes_back() -> None:
    """A scale outside takes a forward pass of its own; nothing else does."""
    plain = net()
    assert isinstance(convert(plain, fold_bn=True), Rewritten)
    assert type(convert(plain, fold_bn=True, scale="inside")) is Net
    kept, report = convert(plain, include=["conv1", "conv2"], report=(report := [])), report
    assert type(kept) is Net  # batch norm follows both
    assert {o.why for o in report if o.rule == "place scale"} == {
        "BatchNorm2d follows it, which is no positively homogeneous activation (ReLU, LeakyReLU, PReLU)"
    }
