"""Folding scales that stand after activations, of either sign: what it computes, what remains, what it says."""

from __future__ import annotations

import copy

import pytest
import torch
from fold_cases import ALONE, CASES, Block, placed, resnet
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import moved, oracle, sequential, tensors, to_gmp, why
from torch import Tensor, nn

from reparam.graph import convert, fold
from reparam.graph.capture import Capture, capture
from reparam.graph.outcome import Outcome
from reparam.graph.rewritten import Rewritten
from reparam.graph.rules.scale import place_scales
from reparam.layers import Reparameterized
from reparam.layers.geometric import scale_units


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
