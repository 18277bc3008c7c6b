"""``reparam.convert``: which layers it takes, what it leaves as it was, what it says, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, noise, outputs, randomized
from scale_oracle import applied, sequential, tensors, why
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from reparam import Outcome, ReparamError, convert, fold
from reparam.errors import NonFiniteError, SelectionError
from reparam.graph.rewritten import Rewritten
from reparam.layers import Reparameterized

EVERY: dict[str, dict[str, Any]] = {
    "SP": {"to": "sp", "fold_bn": True},
    "WN": {"to": "wn"},
    "WN+MBN": {"to": "wn", "fold_bn": True, "mean_norm": True},
    "GmP": {"to": "gmp"},
    "GmP+MN": {"to": "gmp", "fold_bn": True, "mean_norm": True},
    "unit": {"to": "unit", "fold_bn": True},
}


class Net(nn.Module):
    """Batch norm, a functional and an in-place activation, dropout, a pool; it runs what ``run`` says."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.pool, self.drop = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.4)
        self.up, self.head = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Linear(3, 2)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(self, x)
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.drop(self.act(self.bn2(self.conv2(x))))
        return self.head(F.leaky_relu(self.up(x), 0.1).mean((2, 3)))


def net(run: Callable[[Any, Tensor], Tensor] | None = None) -> nn.Module:
    return randomized(Net(run))


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


def converted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, Reparameterized)}


X = noise(3, 2, 7, 9)


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
    assert said.endswith("layers are chosen by their names")
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
