"""Whole networks in every parameterization and back: one row a case.

Of every row it is asked that converted and folded models compute what the original does, that a model whose parameters
training moved anywhere computes the same folded, and that folding gives back the class and the keys. float64 throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import applied, oracle, sequential, tensors, why
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from examples.models.cifar_resnet import resnet20
from examples.models.conv_vae import ConvVAE
from examples.models.convpool_cnn_c import ConvPoolCNNC
from examples.models.dqn import DQN
from examples.models.draw import Draw
from examples.models.mini_vgg import MiniVGG
from examples.models.mlp import MLP
from examples.models.resnet import resnet18, resnet34
from examples.models.vgg6 import vgg6
from reparam import Outcome, convert, fold
from reparam.errors import SelectionError
from reparam.graph.capture import capture
from reparam.graph.rewritten import Rewritten
from reparam.layers import Reparameterized
from reparam.layers.geometric import scale_units


@dataclass(frozen=True)
class Case:
    """One architecture; what is to happen to it was counted by hand.

    Attributes:
        layers: how many layers convert: all but the output layers.
        unit: how many can have unit norm: all whose scale the layers that consume them can take.
        bare: builds the same without batch norm, where the architecture offers that.
        no_mn, no_mbn: how many layers cannot have that mean normalized.
        sign: the layer whose negative r leave a multiplication.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    layers: int
    unit: int
    bare: Callable[[], nn.Module] | None = None
    no_mn: int = 0
    no_mbn: int = 0
    sign: str | None = None


CASES = {
    "MLP": Case(lambda: MLP(5, 9, 2), ((3, 5),), 1, 1),
    "VGG-6": Case(
        lambda: vgg6(classes=5, batch_norm=True), ((2, 3, 9, 11),), 6, 6, bare=lambda: vgg6(classes=5)
    ),
    # The first layer's result is also a shortcut; that of a block's second convolution and of projections goes to a sum.
    "ResNet-18": Case(
        lambda: resnet18(5, "imagenet"), ((2, 3, 33, 35),), 20, 8, lambda: resnet18(5, batch_norm=False),
        sign="conv1",
    ),
    "ResNet-34": Case(
        lambda: resnet34(5, "cifar"), ((2, 3, 9, 11),), 36, 16, lambda: resnet34(5, "cifar", False), sign="conv1"
    ),
    # Its noise depends on the mode: no graph, so the last layer converts too, and no scale can be moved on.
    "ConvPool-CNN-C": Case(lambda: ConvPoolCNNC(3, 8, 5), ((2, 3, 8, 8),), 8, 0),
    "mini-VGG": Case(lambda: MiniVGG(3, 11, 5), ((3, 3, 11, 11),), 5, 5),
    # Two heads and the picture are outputs; behind `expand` a reshape makes channels of its units.
    "VAE": Case(lambda: ConvVAE(1, 12, 4, 3), ((2, 1, 12, 12), (2, 3)), 4, 3, no_mn=1, sign="expand"),
    "DQN": Case(lambda: DQN(3), ((1, 4, 84, 84),), 4, 4),
    # Two LSTM cells and where it reads; all else reaches an output.
    "DRAW": Case(lambda: Draw(1, 7, 2, 6, 4, 2, 3), ((3, 1, 7, 7), (3, 2, 4)), 3, 0, no_mbn=2),
    "ResNet-20": Case(lambda: resnet20(5), ((2, 3, 9, 11),), 19, 9, sign="conv1"),
}  # fmt: skip

FORMS: dict[str, dict[str, Any]] = {
    "SP": {"to": "sp"},
    "WN": {"to": "wn"},
    "WN+MBN": {"to": "wn", "mean_norm": True},
    "GmP": {"to": "gmp"},
    "GmP, scale inside": {"to": "gmp", "scale": "inside"},
    "GmP+MN": {"to": "gmp", "mean_norm": True},
    "unit": {"to": "unit"},
    "unit+MN": {"to": "unit", "mean_norm": True},
}
#: how many batch norms there are to fold
NORMS = {"VGG-6": 6, "ResNet-18": 20, "ResNet-34": 36, "ResNet-20": 19}
#: (architecture, form, whether batch norm stays) -> why nothing converts
UNREACHABLE = {
    ("ConvPool-CNN-C", "unit", False): "what ConvPoolCNNC computes depends on its training mode",
    ("DRAW", "unit", False): "`encoder` is called 2 times",
    ("VGG-6", "unit", True): r"`features\.bn1` \(BatchNorm2d\) takes its output: fold batch norm first",
    ("MLP", "SP", False): "MLP holds plain weights already",
}
ROWS = [
    (name, form, kept)
    for name in CASES
    for form in FORMS
    for kept in (False, True)
    if not any((name, form.partition("+")[0], kept) == row for row in UNREACHABLE)
    and (form != "SP" or (name in NORMS and not kept))
    # With batch norm left where it is, two networks, without shortcuts and with them.
    and (not kept or (name in ("VGG-6", "ResNet-20") and not form.startswith("unit")))
    # The largest networks take seconds a row: what ResNet-20 shows as well is left out.
    and (name != "ResNet-18" or form not in ("GmP, scale inside", "unit+MN"))
    and (name != "ResNet-34" or form == "GmP+MN")
]


@cache
def original(name: str) -> nn.Module:
    """Shared by all rows: converting it must not change it, which every row asks for."""
    return randomized(CASES[name].build())


def inputs(name: str, seed: int = 1) -> tuple[Tensor, ...]:
    return tuple(noise(*shape, seed=seed) for shape in CASES[name].shapes)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """The same model: every parameter changed, every second scale negative, means far from what they were."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        by = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("running_mean", "running_input_mean")):
            tensor += by
        elif isinstance(tensor, nn.Parameter):
            tensor += 0.3 * by
            if name.endswith((".r", "weight_g", "weight_hh_g", "weight_ih_g")):
                tensor[::2] *= -1
                assert bool((tensor < 0).any())
    return model


def expected_keys(plain: nn.Module, folded_norms: bool, normalized: set[str]) -> set[str]:
    """Of the fold: batch norms are gone if they were folded, and what took their shift or a mean has a bias."""
    keys = set(plain.state_dict())
    for name, module in plain.named_modules():
        if folded_norms and isinstance(module, _BatchNorm):
            keys -= {f"{name}.{key}" for key in module.state_dict()}
        if isinstance(module, nn.Conv2d) and module.bias is None and (folded_norms or name in normalized):
            keys.add(f"{name}.bias")
    return keys


@pytest.mark.parametrize(("name", "form", "kept"), ROWS)
def test_network(name: str, form: str, kept: bool) -> None:
    case, options, folds = CASES[name], FORMS[form], name in NORMS and not kept
    plain, x = original(name), inputs(name)
    before = tensors(plain)
    if "mean_norm" in options:
        options = options | {"calibrate": [inputs(name, seed) for seed in (7, 8)]}
    report: list[Outcome] = []
    model = convert(plain, fold_bn=folds, report=report, **options)
    assert difference(model, plain, *x) <= EXACT

    layers = {layer: m for layer, m in model.named_modules() if isinstance(m, Reparameterized)}
    assert len(layers) == {"sp": 0, "unit": case.unit}.get(options["to"], case.layers)
    assert sum(isinstance(m, _BatchNorm) for m in model.modules()) == (NORMS[name] if kept else 0)
    normalized = {layer for layer, m in layers.items() if m.mean is not None}
    assert normalized == applied([o for o in report if o.rule == "mean normalization"])
    if "mean_norm" in options:
        assert len(normalized) == len(layers) - (case.no_mbn if form == "WN+MBN" else case.no_mn)
    means = [buffer for m in layers.values() for buffer in m.buffers(recurse=False)]
    assert len(means) == len(normalized)
    assert all(bool(mean.any()) for mean in means)

    folded = fold(model)
    assert difference(folded, plain, *x) <= EXACT
    assert type(folded) is type(plain)
    keys = expected_keys(plain, folds, normalized)
    assert set(folded.state_dict()) == keys
    gained = {f"{o.layer}.bias" for o in report if o.applied and "gained a bias" in o.why}
    assert gained == keys - set(plain.state_dict())
    fresh = case.bare() if case.bare is not None and folds else case.build()
    if set(fresh.state_dict()) == keys:
        fresh.double().eval().load_state_dict(folded.state_dict(), strict=True)
        assert difference(fresh, plain, *x) <= EXACT
    else:
        assert name == "ResNet-20"
        with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key"):
            fresh.load_state_dict(folded.state_dict(), strict=True)

    # Training may lead anywhere.
    report = []
    again = fold(moved(model), report)
    assert difference(again, model, *x) <= EXACT
    if options["to"] != "sp":
        assert difference(again, plain, *x) > 0.01
    outside = options["to"] == "gmp" and "scale" not in options and not kept
    left = {f"{case.sign}_sign"} if outside and case.sign else set()
    assert set(again.state_dict()) == keys | left
    assert isinstance(again, Rewritten if left else type(plain))
    said = {f"{o.layer}_sign" for o in report if "one multiplication remains" in o.why}
    assert said == left
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert list(plain.state_dict()) == list(before)


@pytest.mark.parametrize("row", UNREACHABLE)
def test_unreachable_is_said(row: tuple[str, str, bool]) -> None:
    name, form, kept = row
    with pytest.raises(SelectionError, match=UNREACHABLE[row]) as caught:
        convert(original(name), fold_bn=name in NORMS and not kept, **FORMS[form])
    assert "\n" not in str(caught.value)


#: of the second convolution
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "padding 0": {},
    "padding 1": {"padding": 1},
    "padding 2": {"padding": 2},
    "padding (2, 0)": {"padding": (2, 0), "kernel_size": (5, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid, no bias": {"padding": "valid", "bias": False},
    "1×1": {"kernel_size": 1},
    "stride": {"padding": 1, "stride": 2},
    "stride (3, 2), dilation": {"padding": 2, "stride": (3, 2), "dilation": 2},
    "groups": {"padding": 1, "groups": 2},
    "depthwise, no bias": {"padding": 1, "groups": 4, "out_channels": 8, "bias": False},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


def convolutional(options: dict[str, Any]) -> nn.Module:
    """conv1 → ReLU → max-pool → conv2 → ReLU → mean → fc."""
    conv2 = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options)
    return sequential(
        conv1=nn.Conv2d(2, 4, 3, padding=1), relu1=nn.ReLU(), pool=nn.MaxPool2d(2), conv2=conv2, relu2=nn.ReLU(),
        mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(conv2.out_channels, 3),
    )  # fmt: skip


class Kept(nn.Module):
    """Between conv1 and conv2 stands what no sign can be moved past."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.fc, self.residual = nn.MaxPool2d(2), nn.Linear(4, 3), residual

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        if self.residual:
            x = self.pool(x)
            return self.fc(F.relu(self.conv2(x) + x).mean((2, 3)))
        return self.fc(F.relu(self.conv2(self.pool(F.avg_pool2d(x, 2)))).mean((2, 3)))


@torch.no_grad()
def by_formula(plain: nn.Module, model: nn.Module, form: str) -> nn.Module:
    """What ``model`` computes in evaluation mode, from its tensors and the table of the parameterizations alone."""
    if form.startswith("GmP"):
        places = {} if "inside" in form else {"conv1": "pool", "conv2": "relu2"}
        return oracle(plain, model, places)
    result = copy.deepcopy(plain)
    result.fc.weight.copy_(model.fc.weight)
    result.fc.bias.copy_(model.fc.bias)
    for name in ("conv1", "conv2"):
        layer, conv = model.get_submodule(name), result.get_submodule(name)
        v, buffers = layer.weight_v, dict(layer.named_buffers())
        norm = v.square().sum((1, 2, 3), keepdim=True).sqrt()
        conv.weight.copy_(v / (norm + 1e-8) if form.startswith("unit") else layer.weight_g * v / norm)
        bias = dict(layer.named_parameters()).get("bias", torch.zeros(len(v)))
        if "running_mean" in buffers:
            bias = bias - buffers["running_mean"]
        if "running_input_mean" in buffers:
            each = (
                buffers["running_input_mean"]
                .reshape(conv.groups, -1)
                .repeat_interleave(len(v) // conv.groups, 0)
            )
            bias = bias - (conv.weight.sum((2, 3)) * each).sum(1)
        conv.bias = nn.Parameter(bias.double())
    return result


@pytest.mark.parametrize("form", [form for form in FORMS if form != "SP"])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution(options: str, form: str) -> None:
    plain, x = convolutional(CONVOLUTIONS[options]), noise(2, 2, 15, 13)
    how = FORMS[form] | ({"calibrate": [noise(3, 2, 14, 11, seed=6) + 1]} if "+" in form else {})
    model = convert(plain, **how)
    assert difference(model, plain, x) <= EXACT
    assert difference(by_formula(plain, model, form), plain, x) <= EXACT
    assert difference(fold(model), plain, x) <= EXACT
    expected = by_formula(plain, moved(model), form)
    report: list[Outcome] = []
    folded = fold(model, report)
    assert difference(model, expected, x) <= EXACT
    assert difference(folded, expected, x) <= EXACT
    # Behind the pool, a sign is moved on: nothing remains of it.
    assert type(folded) is nn.Sequential
    assert scales(folded) == 0
    if form in ("GmP", "GmP+MN"):
        assert scales(model) == 2
        assert why(report, "conv1") == "2 of 4 r negative: their signs pushed into `conv2`"
        assert why(report, "conv2").endswith("pushed into `fc`")
    gained = {"conv2.bias"} if plain.conv2.bias is None and "+" in form else set()
    assert set(folded.state_dict()) == set(plain.state_dict()) | gained


@pytest.mark.parametrize("form", ["GmP", "GmP+MN"])
@pytest.mark.parametrize(
    ("residual", "reason"), [(True, "(a residual connection)"), (False, "signs cannot be moved past that")]
)
def test_a_sign_that_stays(residual: bool, reason: str, form: str) -> None:
    """Before an addition, and before a max-pool that the scale does not stand behind."""
    plain, x = randomized(Kept(residual)), noise(2, 2, 15, 13)
    model = convert(plain, **FORMS[form])
    assert difference(model, plain, x) <= EXACT
    report: list[Outcome] = []
    folded = fold(moved(model), report)
    assert difference(folded, model, x) <= EXACT
    assert scales(folded) == 1
    assert set(folded.state_dict()) - set(plain.state_dict()) == {"conv1_sign"}
    assert why(report, "conv1").startswith("2 of 4 r negative: one multiplication remains")
    assert why(report, "conv1").endswith(reason)
    with torch.no_grad():
        model.conv1.r.abs_()
    assert type(fold(model)) is Kept


def scales(model: nn.Module) -> int:
    """Multiplications by a scale or a sign in the graph."""
    return sum(node.target is scale_units for node in capture(model).nodes())
