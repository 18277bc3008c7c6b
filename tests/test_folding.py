"""Folding scales that stand after activations, of either sign: what it computes, what remains, what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import MODELS, moved, oracle, sequential, tensors, to_gmp, why
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from reparam.errors import ReparamError
from reparam.graph import convert, fold, load_architecture
from reparam.graph.capture import Capture, capture
from reparam.graph.outcome import Outcome
from reparam.graph.rewritten import Rewritten
from reparam.graph.rules.scale import place_scales
from reparam.layers import Reparameterized
from reparam.layers.geometric import scale_units


@dataclass(frozen=True)
class Case:
    """A network of modules.

    Attributes:
        places: layer -> module behind which its scale stands.
        pushed: layer -> where the signs of its r go.
        remains: layer -> why its signs stay.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    places: dict[str, str]
    pushed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remains: dict[str, str] = field(default_factory=dict)


class Block(nn.Module):
    """Two consumers of one result, in the way ``joined`` says."""

    def __init__(self, joined: str) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.conv1(x))
        if self.joined == "convs":
            return self.conv2(y) + self.conv3(y)
        if self.joined == "residual":
            return self.conv2(y) + y
        if self.joined == "twice":
            return self.conv2(self.conv2(y))
        if self.joined == "concatenated":
            return self.conv3(self.conv2(torch.cat([y[:, :2], y[:, 2:]], 1)))
        if self.joined == "read":
            return self.conv2(y) + F.conv2d(y, self.conv3.weight)
        if self.joined == "functional":
            return self.conv2(F.avg_pool2d(F.dropout(y, training=False), 3, 1, 1))
        assert self.joined == "output"
        return y


def resnet() -> nn.Module:
    args = {"blocks": "(1, 1, 1, 1)", "classes": "5", "stem": "imagenet", "batch_norm": "False"}
    return randomized(load_architecture(f"{MODELS / 'resnet.py'}:ResNet", args))


def vae() -> nn.Module:
    args = {"channels": "1", "size": "8", "width": "4", "latent": "3"}
    return randomized(load_architecture(f"{MODELS / 'conv_vae.py'}:ConvVAE", args))


def tied() -> nn.Module:
    model = sequential(
        conv1=nn.Conv2d(3, 3, 1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(3, 3, 1),
        tanh=nn.Tanh(),
        conv3=nn.Conv2d(3, 3, 1),
    )
    model.conv3.weight = model.conv2.weight
    return model


def block(joined: str, shape: tuple[int, ...] = (2, 2, 5, 5), **expected: dict[str, object]) -> Case:
    return Case(lambda: randomized(Block(joined)), (shape,), {"conv1": "relu1"}, **expected)


CASES = {
    "conv relu pool conv": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 4, 2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc=nn.Linear(16, 3),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool", "conv2": "relu2"},
        {"conv1": ("conv2",), "conv2": ("fc",)},
    ),
    "pool, flatten, linear": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            relu1=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(36, 5),
            relu2=nn.ReLU(),
            fc2=nn.Linear(5, 3),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool", "fc1": "relu2"},
        {"conv1": ("fc1",), "fc1": ("fc2",)},
    ),
    "average pool, dropout, flatten, linear": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            act=nn.LeakyReLU(0.2),
            avg=nn.AvgPool2d(2),
            drop=nn.Dropout(),
            all=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "act"},
        {"conv1": ("fc",)},
    ),
    "grouped and depthwise": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            act1=nn.PReLU(4),
            conv2=nn.Conv2d(4, 6, 3, groups=2),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(6, 12, 2, groups=6, padding=1, padding_mode="reflect"),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "act1", "conv2": "act2"},
        {"conv1": ("conv2",), "conv2": ("conv3",)},
    ),
    "transposed and grouped": Case(
        lambda: sequential(
            conv1=nn.ConvTranspose2d(4, 6, 3, groups=2),
            act1=nn.ReLU(),
            conv2=nn.ConvTranspose2d(6, 9, 2, 2, groups=3),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(9, 3, 1),
        ),
        ((2, 4, 3, 3),),
        {"conv1": "act1", "conv2": "act2"},
        {"conv1": ("conv2",), "conv2": ("conv3",)},
    ),
    "other kinds": Case(
        lambda: sequential(
            fc1=nn.Linear(3, 4),
            act1=nn.ReLU(),
            fc2=Conv1D(5, 4),
            act2=nn.ReLU(),
            fc3=Conv1D(6, 5),
            act3=nn.ReLU(),
            conv=nn.Conv1d(6, 2, 1),
        ),
        ((2, 6, 3),),
        {"fc1": "act1", "fc2": "act2", "fc3": "act3"},
        {"fc1": ("fc2",), "fc2": ("fc3",)},
        {"fc3": "does not take its units as input channels"},
    ),
    "a max-pool behind an average": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            relu1=nn.ReLU(),
            avg=nn.AvgPool2d(2, 1),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 3, 2),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "relu1"},
        remains={"conv1": "`pool`"},
    ),
    "two max-pools": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, 1),
            pool2=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 3, 2),
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool1"},
        remains={"conv1": "`pool2`"},
    ),
    "another activation": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(), act=nn.LeakyReLU(0.3), conv2=nn.Conv2d(4, 3, 2)
        ),
        ((2, 2, 8, 8),),
        {"conv1": "relu1"},
        remains={"conv1": "`act`"},
    ),
    "batch norm": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(), bn=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 3, 2)
        ),
        ((2, 2, 8, 8),),
        {"conv1": "relu1"},
        remains={"conv1": "`bn`"},
    ),
    "tied": Case(tied, ((2, 3, 4, 4),), {"conv1": "relu1"}, remains={"conv1": "shares parameters"}),
    "two convolutions": block("convs", pushed={"conv1": ("conv2", "conv3")}),
    "functions between": block("functional", pushed={"conv1": ("conv2",)}),
    "residual": block("residual", remains={"conv1": "residual"}),
    "called twice": block("twice", remains={"conv1": "called 2 times"}),
    "concatenated": block("concatenated", remains={"conv1": "getitem"}),
    "read": block("read", remains={"conv1": "conv2d"}),
    "output": block("output", remains={"conv1": "its output leaves the network"}),
    "VAE": Case(
        vae,
        ((2, 1, 8, 8), (2, 3)),
        {"conv1": "relu1", "conv2": "relu2", "expand": "relu3", "deconv1": "relu4"},
        {"conv1": ("conv2",), "conv2": ("mean", "log_variance"), "deconv1": ("deconv2",)},
        {"expand": "unflatten"},
    ),
}
#: converted in one layer alone
ALONE = {"tied": "conv1", "read": "conv1", "batch norm": "conv1"}


def placed(plain: nn.Module, alone: str | None = None) -> nn.Module:
    """Converted, all or one layer, every scale placed that can be."""
    chosen = plain.get_submodule(alone) if alone else None
    return place_scales(to_gmp(plain, lambda module: chosen is None or module is chosen))[0]


@pytest.mark.parametrize("name", CASES)
def test_scales_of_either_sign(name: str) -> None:
    case = CASES[name]
    plain, x = case.build(), [noise(*shape) for shape in case.shapes]
    model = moved(placed(plain, ALONE.get(name)))
    expected, before = oracle(plain, model, case.places), tensors(model)
    assert difference(model, expected, *x) <= EXACT
    report: list[Outcome] = []
    folded = fold(model, report)
    assert difference(folded, expected, *x) <= EXACT
    assert not any(isinstance(module, Reparameterized) for module in folded.modules())

    layers = [name for name, m in model.named_modules() if isinstance(m, Reparameterized)]
    assert [(o.rule, o.layer, o.applied) for o in report] == [("fold", layer, True) for layer in layers]
    for layer, consumers in case.pushed.items():
        assert why(report, layer).endswith(f"signs pushed into {', '.join(f'`{c}`' for c in consumers)}")
    for layer, reason in case.remains.items():
        assert "one multiplication remains, " in why(report, layer)
        assert reason in why(report, layer)
    left = [str(n.args[1].target) for n in capture(folded).nodes() if n.target is scale_units]
    assert left == [f"{layer}_sign" for layer in case.remains]
    assert set(folded.state_dict()) == {*plain.state_dict(), *left}
    if left:
        assert isinstance(folded, Rewritten)
        assert folded.original is type(plain)
        for layer, key in zip(case.remains, left, strict=True):
            assert torch.equal(folded.state_dict()[key], model.get_submodule(layer).r.sign())
    else:
        assert type(folded) is type(plain)
        assert list(folded.state_dict()) == list(plain.state_dict())
        fresh = case.build()
        fresh.load_state_dict(folded.state_dict(), strict=True)
        assert difference(fresh, expected, *x) <= EXACT
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert difference(model, expected, *x) <= EXACT


@pytest.mark.parametrize(
    "name", ["conv relu pool conv", "VAE", "residual", "transposed and grouped", "output"]
)
def test_positive_scales_leave_nothing(name: str) -> None:
    case = CASES[name]
    plain, x = case.build(), [noise(*shape) for shape in case.shapes]
    model = placed(plain)
    with torch.no_grad():
        for layer in case.places:
            model.get_submodule(layer).r.mul_(1.5)[0] = 0.0
    report: list[Outcome] = []
    folded = fold(model, report)
    assert type(folded) is type(plain)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert difference(folded, oracle(plain, model, case.places), *x) <= EXACT
    assert {why(report, layer) for layer in case.places} == {"r folded into the layer"}


def test_resnet() -> None:
    plain, x = resnet(), noise(2, 3, 33, 33)
    model = moved(placed(plain))
    places = {"conv1": "maxpool", **{f"layer{i}.0.conv1": f">layer{i}.0.conv2" for i in range(1, 5)}}
    report: list[Outcome] = []
    folded = fold(model, report)
    assert difference(folded, oracle(plain, model, places), x) <= EXACT
    assert set(folded.state_dict()) - set(plain.state_dict()) == {"conv1_sign"}
    assert "pushed into `layer4.0.conv2`" in why(report, "layer4.0.conv1")
    assert why(report, "layer4.0.conv2") == "GmPConv2d folded into Conv2d"
    with torch.no_grad():
        model.conv1.r.abs_()
    assert type(fold(model)) is type(plain)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_consumer_that_normalizes_its_mean(groups: int) -> None:
    """Its running mean is that of an input with its sign: the bias it folds to knows nothing of the push."""
    plain = sequential(
        conv1=nn.Conv2d(2, 4, 3),
        relu1=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(4, 4, 2, padding=1, groups=groups, bias=False),
        relu2=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(64, 3),
    )
    model, x = placed(plain), noise(2, 2, 8, 8)
    for layer in (model.conv1, model.conv2, model.fc):
        layer.normalize_mean()
    moved(model)
    with torch.no_grad():
        for layer in (model.conv1, model.conv2, model.fc):
            layer.running_input_mean.copy_(noise(len(layer.running_input_mean), seed=8))
    expected = oracle(plain, model, {"conv1": "pool", "conv2": "relu2"})
    assert difference(model, expected, x) <= EXACT
    folded = fold(model)
    assert difference(folded, expected, x) <= EXACT
    assert type(folded) is nn.Sequential
    assert set(folded.state_dict()) - set(plain.state_dict()) == {"conv2.bias"}


def test_a_plain_and_a_frozen_consumer() -> None:
    plain = CASES["conv relu pool conv"].build()
    plain.conv2.requires_grad_(False)
    x = noise(2, 2, 8, 8)
    model = moved(placed(plain, "conv1"))
    folded = fold(model)
    assert difference(folded, oracle(plain, model, {"conv1": "pool"}), x) <= EXACT
    assert torch.equal(folded.conv2.weight, model.conv1.r.sign()[:, None, None] * model.conv2.weight)
    assert not folded.conv2.weight.requires_grad
    assert folded.conv1.weight.requires_grad


def test_a_hook_in_between_keeps_its_values() -> None:
    plain = CASES["average pool, dropout, flatten, linear"].build()
    for name in ("avg", "fc"):
        model = moved(placed(plain))
        seen: list[Tensor] = []
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, to=seen: to.append(args[0]))
        report: list[Outcome] = []
        folded = fold(model, report)
        assert f"hooks of `{name}`" in why(report, "conv1")
        assert difference(folded, model, noise(2, 2, 8, 8)) <= EXACT
        assert torch.allclose(seen[0], seen[1], rtol=EXACT, atol=EXACT)


def test_a_sign_in_the_wrong_place_is_seen() -> None:
    """The bars above are worth something: a sign moved past a max-pool or an addition moves the output."""
    for name in ("two max-pools", "residual"):
        case = CASES[name]
        plain, x = case.build(), noise(*case.shapes[0])
        model = moved(placed(plain))
        folded = fold(model)
        wrong = copy.deepcopy(folded)
        with torch.no_grad():
            wrong.conv2.weight *= folded.conv1_sign.reshape(1, -1, 1, 1)
            wrong.conv1_sign.fill_(1.0)
        assert difference(wrong, model, x) > 1e-3


def test_what_remains_folds_moves_and_converts_again() -> None:
    case = CASES["residual"]
    model, x = moved(placed(case.build())), noise(*case.shapes[0])
    folded = fold(model)
    assert difference(fold(folded), model, x) <= EXACT
    assert folded.conv1_sign.dtype == torch.float64
    assert folded.float().conv1_sign.dtype == torch.float32
    folded.double()
    again, outcomes = place_scales(to_gmp(folded))
    assert why(outcomes, "conv1") == "after `relu1`"
    moved(again)
    assert difference(fold(again), again, x) <= EXACT


def test_names_that_are_taken() -> None:
    plain = randomized(Block("residual"))
    plain.register_buffer("conv1_sign", torch.ones(1))
    model = moved(placed(plain))
    assert set(fold(model).state_dict()) - set(plain.state_dict()) == {"conv1_sign_"}
    assert difference(fold(model), model, noise(2, 2, 5, 5)) <= EXACT


def test_float32_is_rounded_once() -> None:
    plain = CASES["conv relu pool conv"].build()
    wide = moved(placed(plain))
    narrow = copy.deepcopy(wide).float()
    for key, value in fold(narrow).state_dict().items():
        assert value.dtype == torch.float32
        expected = fold(copy.deepcopy(narrow).double()).state_dict()[key]
        assert torch.equal(value, expected.float())


def test_scales_that_are_somewhere_else() -> None:
    model = moved(placed(CASES["output"].build()))
    for part in (nn.Sequential(model), nn.ModuleDict({"a": model.conv1})):
        with pytest.raises(ReparamError, match=r"conv1|a") as caught:
            fold(part)
        assert "its scale stands outside of the layer" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_a_graph_everything_folds_as_before() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    plain = randomized(Branching())
    model = moved(placed(plain))
    assert isinstance(capture(model), Capture)
    assert capture(model).graph is None
    report: list[Outcome] = []
    folded = fold(model, report)
    assert type(folded) is Branching
    assert report == [Outcome("fold", "fc", True, "GmPLinear folded into Linear")]
    assert difference(folded, oracle(plain, model, {}), noise(2, 3)) <= EXACT


@pytest.mark.parametrize("signs", [False, True])
def test_tied_layers_each_have_their_scale(signs: bool) -> None:
    """The graph shows the r of both under the name of the first."""
    plain = sequential(
        a=nn.Linear(4, 4), relu1=nn.ReLU(), b=nn.Linear(4, 4), relu2=nn.ReLU(), c=nn.Linear(4, 3)
    )
    plain.b.weight = plain.a.weight
    model, x = convert(plain, "gmp"), noise(5, 4)
    assert difference(model, plain, x) <= EXACT
    assert model.a.r is model.b.r
    assert model.a.scale_outside
    assert model.b.scale_outside
    with torch.no_grad():
        model.a.lambda_ += 0.25
        model.a.r *= torch.tensor([-1.0 if signs else 1.0, 2.0, 0.5, 1.0])
    report: list[Outcome] = []
    folded = fold(model, report)
    assert difference(folded, model, x) <= EXACT
    assert folded.a.weight is folded.b.weight
    if signs:
        assert "one multiplication remains" in why(report, "a")
        assert "pushed into `c`" in why(report, "b")
        assert set(folded.state_dict()) - set(plain.state_dict()) == {"a_sign"}
    else:
        assert type(folded) is nn.Sequential
