"""``reparam.convert``: which layers it takes, what it leaves as it was, what it says, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, noise, outputs, randomized
from model_cases import X, converted, net
from scale_oracle import applied, sequential, tensors, why
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from reparam import Outcome, convert, fold
from reparam.errors import SelectionError

EVERY: dict[str, dict[str, Any]] = {
    "SP": {"to": "sp", "fold_bn": True},
    "WN": {"to": "wn"},
    "WN+MBN": {"to": "wn", "fold_bn": True, "mean_norm": True},
    "GmP": {"to": "gmp"},
    "GmP+MN": {"to": "gmp", "fold_bn": True, "mean_norm": True},
    "unit": {"to": "unit", "fold_bn": True},
}


class Branches(nn.Module):
    """Its path depends on the data: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.lm_head = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.body(x))) if x.sum() > 0 else self.lm_head(x)


class Tells(Branches):
    def get_output_embeddings(self) -> nn.Module:
        return self.out


class Tied(nn.Module):
    """An embedding whose weight is the head's; two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.b.weight = self.embedding.weight, self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.embedding(x))))))


class Sub(nn.Linear):
    """A class of the user's own."""


def hooked(layer: nn.Module, by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A layer whose weight is computed; building it is deprecated in torch."""
    with pytest.warns(FutureWarning):
        return by(layer)


def test_the_default_is_all_but_the_output_layer() -> None:
    report: list[Outcome] = []
    assert converted(convert(net(), report=report)) == {"conv1", "conv2", "up"}
    assert Outcome("swap", "head", False, "output layer") in report
    assert [o.layer for o in report if o.rule == "swap" and o.applied] == ["conv1", "conv2", "up"]


@pytest.mark.parametrize(
    ("options", "layers", "left"),
    [
        ({"include": ["conv*"]}, {"conv1", "conv2"}, {"up": "no include matches", "head": "no include matches"}),
        ({"include": ["head"]}, {"head"}, {"conv1": "no include matches"}),
        ({"exclude": ["conv1", "u?"]}, {"conv2"}, {"conv1": "exclude conv1", "up": "exclude u?", "head": "output layer"}),
        ({"include": ["*"], "exclude": ["conv2"]}, {"conv1", "up", "head"}, {"conv2": "exclude conv2"}),
        ({"select": lambda name, m: isinstance(m, nn.Linear)}, {"head"}, {"conv1": "not selected"}),
        ({"select": lambda name, m: name != "up", "exclude": ["conv2"]}, {"conv1", "head"}, {"up": "not selected"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["gmp", "wn"])
def test_what_is_chosen(options: dict[str, Any], layers: set[str], left: dict[str, str], to: str) -> None:
    plain, report = net(), list[Outcome]()
    model = convert(plain, to, report=report, **options)
    assert converted(model) == layers
    assert {o.layer for o in report if o.rule == "swap" and o.applied} == layers
    for layer, reason in left.items():
        assert Outcome("swap", layer, False, reason) in report
    assert difference(model, plain, X) <= EXACT


def test_output_layers_are_the_last_before_every_output() -> None:
    def two_heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(m.conv1(x))
        return m.conv2(x), m.head(F.relu(m.up(x)).mean((2, 3)))

    assert converted(convert(net(two_heads), "wn")) == {"conv1", "up"}


@pytest.mark.parametrize("last", [Sub, lambda *size: parametrizations.weight_norm(nn.Linear(*size))])
def test_a_last_layer_that_cannot_be_converted_is_still_the_last(last: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), last(3, 2))
    assert converted(convert(randomized(model), "wn")) == {"0", "2"}


def test_torch_s_transformers_are_not_looked_into() -> None:
    """Their layers convert, and what is before them is not the output layer, whatever is in them."""
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    plain, x = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), encoder)), noise(2, 5, 3)
    model = convert(plain)
    assert converted(model) >= {"0", "2.self_attn.out_proj", "2.linear1", "2.linear2"}
    assert difference(model, plain, x) <= EXACT
    assert difference(fold(model), plain, x) <= EXACT


@pytest.mark.parametrize("to", ["gmp", "wn"])
def test_a_layer_inside_a_layer_is_converted_too(to: str) -> None:
    """An attention and its output projection."""
    encoder, x = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), noise(2, 5, 4)
    plain, report = randomized(nn.Sequential(encoder, nn.Linear(4, 2))), list[Outcome]()
    model = convert(plain, to, report=report)
    assert converted(model) == {o.layer for o in report if o.rule == "swap" and o.applied}
    assert "0.self_attn.out_proj" in converted(model)
    assert difference(model, plain, x) <= EXACT
    assert difference(fold(model), plain, x) <= EXACT
    assert list(fold(model).state_dict()) == list(plain.state_dict())


def test_a_model_that_is_one_layer() -> None:
    plain, x = randomized(nn.Linear(3, 2)), noise(4, 3)
    with pytest.raises(SelectionError, match=r"^nothing of Linear can be converted to gmp: output layer$"):
        convert(plain)
    model = convert(plain, include=["*"], mean_norm=True, calibrate=[x])
    assert type(model).__name__ == "GmPLinear"
    assert difference(model, plain, x) <= EXACT
    assert type(fold(model)) is nn.Linear


@pytest.mark.parametrize(("model", "left"), [(Branches, {"lm_head"}), (Tells, {"out"})])
def test_without_a_graph_names_decide_and_it_is_said(model: type[nn.Module], left: set[str]) -> None:
    plain, report = randomized(model()), list[Outcome]()
    found = convert(plain, report=report)
    said = why([o for o in report if o.rule == "graph"], "")
    assert said.startswith(f"torch.fx cannot trace {model.__name__}: ")
    assert said.endswith(
        "rules that need the graph are not possible, layers are converted one by one and chosen by their names"
    )
    if model is Tells:
        assert Outcome("swap", "out", False, "output layer, says the model") in report
        left = left | {"lm_head"}
    assert Outcome("swap", "lm_head", False, "name is on the default list (lm_head)") in report
    assert converted(found) == {"body", "out", "lm_head"} - left
    assert type(found) is model
    for x in (noise(2, 3).abs(), -noise(2, 3).abs()):
        assert difference(found, plain, x) <= EXACT
    assert {o.applied for o in report if o.rule == "place scale"} == {False}
    report = []
    convert(plain, include=["*"], report=report)
    assert not any(o.rule == "graph" for o in report)
    with pytest.raises(SelectionError, match=r"to unit: torch\.fx cannot trace"):
        convert(plain, "unit")


def test_tied_weights() -> None:
    plain, x, report = randomized(Tied()), torch.tensor([[0, 3, 1], [4, 2, 2]]), list[Outcome]()
    for to in ("gmp", "wn"):
        model = convert(plain, to, report=report)
        assert converted(model) == {"a", "b"}
        role = "theta" if to == "gmp" else "weight_v"
        assert getattr(model.a, role) is getattr(model.b, role)
        assert "sharing its weight with `a`" in why([o for o in report if o.why.endswith("`a`")], "b")
        assert model.head.weight is model.embedding.weight
        assert difference(model, plain, x) <= EXACT
        folded = fold(model)
        assert folded.a.weight is folded.b.weight
        assert difference(folded, plain, x) <= EXACT
        report.clear()
    convert(plain, include=["head", "a", "b"], report=report)
    assert why(report, "head").startswith("its weight is shared with `embedding` (Embedding), which cannot")
    with pytest.raises(SelectionError, match=r"a: its weight is shared with `b`: include both, or neither"):
        convert(plain, include=["a"])


@pytest.mark.parametrize("to", ["gmp", "wn"])
def test_a_shared_bias(to: str) -> None:
    """λ = b/‖w‖ is another for each layer."""
    plain = sequential(a=nn.Linear(4, 4), tanh=nn.Tanh(), b=nn.Linear(4, 4), end=nn.Tanh(), c=nn.Linear(4, 2))
    plain.b.bias = plain.a.bias
    report: list[Outcome] = []
    model = convert(plain, to, include=["*"], report=report)
    assert converted(model) == {"c"}
    assert why([o for o in report if o.rule == "swap"], "a") == "its bias is shared with `b`"
    assert model.b.bias is model.a.bias
    assert difference(model, plain, noise(5, 4)) <= EXACT


def test_tied_weights_whose_scales_stand_in_different_places() -> None:
    """Behind ReLU the fold takes |r|: the layers part if that is another weight."""
    plain = sequential(
        a=nn.Linear(4, 4), act=nn.ReLU(), b=nn.Linear(4, 4), tanh=nn.Tanh(), end=nn.Linear(4, 2)
    )
    plain.b.weight = plain.a.weight
    model, x = convert(plain), noise(5, 4)
    assert (model.a.scale_outside, model.b.scale_outside) == (True, False)
    assert model.a.r is model.b.r
    folded = fold(model)
    assert folded.a.weight is folded.b.weight
    assert difference(folded, plain, x) <= EXACT
    with torch.no_grad():
        model.a.r[::2] *= -1
    folded = fold(model)
    assert folded.a.weight is not folded.b.weight
    assert difference(folded, model, x) <= EXACT


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sub(3, 3), "Sub is a class of its own beyond Linear"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "remove_parametrizations"),
        (lambda: hooked(nn.Linear(3, 3), nn.utils.weight_norm), "computed by a hook of torch.nn.utils"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "computed by a hook of torch.nn.utils"),
    ],
)
def test_layers_that_compute_something_else(make: Callable[[], nn.Module], reason: str) -> None:
    plain = randomized(nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2)))
    for to in ("gmp", "wn"):
        report: list[Outcome] = []
        model = convert(plain, to, report=report)
        assert converted(model) == {"0"}
        assert type(model[1]) is type(plain[1])
        assert reason in why([o for o in report if o.rule == "swap"], "1")
        assert difference(model, plain, noise(4, 3)) <= EXACT
        with pytest.raises(SelectionError) as caught:
            convert(plain, to, include=["1"])
        assert str(caught.value).startswith("include 1: `1`: ")
        assert reason in str(caught.value)


@pytest.mark.parametrize("form", EVERY)
def test_the_model_is_not_touched_and_its_ways_are_kept(form: str) -> None:
    plain = net().train()
    plain.conv2.eval()
    plain.bn1.eval()
    plain.conv1.requires_grad_(False)
    plain.bn1.requires_grad_(False)
    plain.head.bias.requires_grad_(False)
    seen: list[str] = []
    plain.up.register_forward_hook(lambda m, args, out: seen.append("up"))
    plain.drop.register_forward_pre_hook(lambda m, args: seen.append("drop"))
    before, modules = tensors(plain), dict(plain.named_modules())
    state = {n: (type(m), m.training, len(m._forward_hooks)) for n, m in modules.items()}
    trained = {n: p.requires_grad for n, p in plain.named_parameters()}

    options = EVERY[form] | ({"calibrate": [X, X + 1]} if "+" in form else {})
    report: list[Outcome] = []
    model = convert(plain, report=report, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert dict(plain.named_modules()) == modules
    assert {n: (type(m), m.training, len(m._forward_hooks)) for n, m in plain.named_modules()} == state
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == trained
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())

    assert {n: m.training for n, m in model.named_modules()} == {n: m.training for n, m in modules.items()}
    assert not any(p.requires_grad for p in model.conv1.parameters())
    assert all(p.requires_grad for p in model.conv2.parameters())
    assert not model.head.bias.requires_grad
    seen.clear()
    model.eval()(X)
    assert seen == ["drop", "up"]
    said = {o.layer for o in report if "evaluation statistics used" in o.why}
    assert said == ({"conv2"} if "fold_bn" in options else set())
    folded = fold(model)
    assert {n: p.requires_grad for n, p in folded.named_parameters() if n in trained} == {
        n: value for n, value in trained.items() if n in dict(folded.named_parameters())
    }


@pytest.mark.parametrize("to", ["gmp", "wn"])
def test_training_is_the_same_where_no_mean_is_normalized(to: str) -> None:
    plain = net().train()
    model = convert(plain, to)
    (expected,), (found,) = outputs(plain, X), outputs(model, X)
    assert float((found - expected).abs().max() / expected.abs().max()) <= EXACT
    torch.testing.assert_close(model.bn2.running_mean, plain.bn2.running_mean, rtol=EXACT, atol=EXACT)


def test_from_one_parameterization_to_the_next() -> None:
    plain = sequential(
        a=nn.Conv2d(2, 4, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2), b=nn.Conv2d(4, 4, 2, bias=False), end=nn.Tanh(),
        flat=nn.Flatten(), c=nn.Linear(8, 5), tanh=nn.Tanh(), d=nn.Linear(5, 2),
    )  # fmt: skip
    x = noise(3, 2, 8, 7)
    model = convert(plain, "gmp", mean_norm=True, calibrate=[x + 1])
    with torch.no_grad():
        model.a.r[::2] *= -1
        model.c.lambda_.add_(0.3)
        model.b.running_input_mean.add_(0.5)
    expected = copy.deepcopy(model)
    for options in (
        {"to": "wn"},
        {"to": "gmp", "scale": "inside"},
        {"to": "wn", "mean_norm": "mn", "calibrate": [x]},
        {"to": "gmp", "mean_norm": "mbn"},
        {"to": "unit"},
        {"to": "gmp"},
        {"to": "sp"},
    ):
        report: list[Outcome] = []
        model = convert(model, report=report, **options)
        assert difference(model, expected, x) <= EXACT, options
        assert applied([o for o in report if o.rule == "fold"])
    assert type(model) is nn.Sequential
    assert set(model.state_dict()) - set(plain.state_dict()) == {"b.bias"}
    with pytest.raises(
        SelectionError, match="Sequential holds plain weights already: nothing to convert to sp"
    ):
        convert(model, "sp", report=report)
