"""A converted model goes to a file and back: what its records say is enough to rebuild it in the plain architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import EXACT, difference, noise, outputs, randomized
from scale_oracle import sequential
from support import assert_same_bits, done, refused, run
from torch import Tensor, nn
from torch.nn import functional as F

from examples.models.draw import Draw
from reparam import convert, fold, load_state_dict, save_state_dict
from reparam.checkpoint import metadata
from reparam.checkpoint.metadata import LayerRecord
from reparam.errors import ArchitectureError, CheckpointError
from reparam.graph import apply_records, load_into, records_of
from reparam.graph.rules.batch_norm import FoldedBatchNorm
from reparam.layers import Reparameterized
from reparam.parameterizations import UnitAxis, WeightSpec


def normed() -> nn.Module:
    return sequential(
        conv1=nn.Conv2d(2, 4, 3, bias=False), bn1=nn.BatchNorm2d(4), relu=nn.ReLU(), pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(4, 6, 3, padding=1, groups=2), bn2=nn.BatchNorm2d(6), act=nn.PReLU(),
        up=nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False), bn3=nn.BatchNorm2d(4), tanh=nn.Tanh(),
        mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc1=nn.Linear(4, 3, bias=False), relu2=nn.ReLU(),
        fc2=nn.Linear(3, 2),
    )  # fmt: skip


class Tied(nn.Module):
    """Two layers with one weight, one of them under two names; an embedding that is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.b.weight = self.embedding.weight, self.a.weight
        self.again = nn.ModuleList([self.b])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again[0](F.relu(self.a(self.embedding(x))))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Aliased(nn.Module):
    """A batch norm under three names, called by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.norms, self.other = nn.ModuleList([self.bn]), self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.other(self.conv(x))))


class TwoNorms(nn.Module):
    """Two batch norms behind one layer, the first of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.other, self.head = self.bn, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn2(self.bn(self.conv(x)))))


def zero_rows() -> nn.Module:
    """A row of zeros with a bias: no lambda is usable; a layer of one input; a layer without bias."""
    model = sequential(
        a=nn.Linear(3, 4), act=nn.ReLU(), b=nn.Linear(4, 1), act2=nn.LeakyReLU(), c=nn.Linear(1, 3, bias=False),
        act3=nn.ReLU(), d=nn.Linear(3, 2),
    )  # fmt: skip
    with torch.no_grad():
        model.a.weight[1] = 0.0
    return model


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    options: dict[str, Any]


X = noise(2, 2, 9, 8)
WORDS = torch.tensor([[0, 3, 1], [4, 2, 2]])
DRAW = noise(2, 1, 6, 6), noise(2, 2, 3)
CASES = {
    "batch norm stays": Case(normed, (X,), {"to": "gmp"}),
    "batch norm folded": Case(normed, (X,), {"to": "gmp", "fold_bn": True}),
    "scale inside": Case(normed, (X,), {"to": "gmp", "fold_bn": True, "scale": "inside"}),
    "MN": Case(normed, (X,), {"to": "gmp", "fold_bn": True, "mean_norm": True, "momentum": 0.25, "calibrate": [X]}),
    "MN beside batch norm": Case(normed, (X,), {"to": "gmp", "mean_norm": True, "calibrate": [X + 1]}),
    "MBN": Case(normed, (X,), {"to": "wn", "fold_bn": True, "mean_norm": True, "momentum": 0.125, "calibrate": [X]}),
    "WN": Case(normed, (X,), {"to": "wn"}),
    "unit norm": Case(normed, (X,), {"to": "unit", "fold_bn": True}),
    "unit norm, MN": Case(normed, (X,), {"to": "unit", "fold_bn": True, "mean_norm": True, "calibrate": [X]}),
    "plain, batch norm folded": Case(normed, (X,), {"to": "sp", "fold_bn": True}),
    "one layer, batch norm folded": Case(normed, (X,), {"to": "gmp", "fold_bn": True, "include": ["conv2"]}),
    "batch norm under three names": Case(lambda: randomized(Aliased()), (X,), {"to": "gmp", "fold_bn": True}),
    "two batch norms": Case(lambda: randomized(TwoNorms()), (X,), {"to": "gmp", "fold_bn": True}),
    "plain, two batch norms": Case(lambda: randomized(TwoNorms()), (X,), {"to": "sp", "fold_bn": True}),
    "tied": Case(lambda: randomized(Tied()), (WORDS,), {"to": "gmp"}),
    "tied, MN": Case(lambda: randomized(Tied()), (WORDS,), {"to": "gmp", "mean_norm": True, "calibrate": [WORDS]}),
    "tied, WN": Case(lambda: randomized(Tied()), (WORDS,), {"to": "wn"}),
    "LSTM": Case(lambda: randomized(Recurrent()), (noise(4, 2, 3),), {"to": "gmp"}),
    "LSTM, MN": Case(
        lambda: randomized(Recurrent()), (noise(4, 2, 3),),
        {"to": "wn", "mean_norm": "mn", "momentum": 0.5, "calibrate": [noise(3, 2, 3)]},
    ),
    "DRAW": Case(
        lambda: randomized(Draw(1, 6, 2, 5, 3, 2, 2)), DRAW, {"to": "gmp", "mean_norm": True, "calibrate": [DRAW]}
    ),
    "zero rows": Case(zero_rows, (noise(5, 3),), {"to": "gmp"}),
    "zero rows, MN": Case(zero_rows, (noise(5, 3),), {"to": "gmp", "mean_norm": True, "calibrate": [noise(4, 3)]}),
}  # fmt: skip


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Every parameter changed, as training might: r of both signs."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def there_and_back(model: nn.Module, plain: nn.Module, path: Path) -> nn.Module:
    """The model a file of ``model`` gives in the architecture of ``plain``, whose own values play no part."""
    records = records_of(model)
    save_state_dict(model.state_dict(), records, path)
    tensors, read = load_state_dict(path)
    assert read == records
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(7.0)
    found = apply_records(plain, read)
    load_into(found, tensors, "file")
    assert all(bool((parameter == 7.0).all()) for parameter in plain.parameters())
    return found.eval()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    build, x, options = CASES[case].build, CASES[case].inputs, CASES[case].options
    plain = build()
    model = convert(plain, **options)
    assert difference(model, plain, *x) <= EXACT
    moved(model)
    found = there_and_back(model, build(), tmp_path / "model.safetensors")
    for a, b in zip(outputs(found, *x), outputs(model, *x), strict=True):
        assert torch.equal(a, b)
    assert_same_bits(found.state_dict(), model.state_dict())
    assert list(found.state_dict()) == list(model.state_dict())
    assert [(n, type(m).__name__) for n, m in found.named_modules()] == [
        (n, type(m).__name__) for n, m in model.named_modules()
    ]
    assert tied(found) == tied(model)
    assert means(found) == means(model)
    assert records_of(found) == records_of(model)
    if options["to"] != "sp":
        assert_same_bits(fold(found).state_dict(), fold(model).state_dict())


def tied(model: nn.Module) -> list[set[str]]:
    """Names of parameters that are one."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def means(model: nn.Module) -> dict[str, Any]:
    return {name: m.mean for name, m in model.named_modules() if isinstance(m, Reparameterized)}


def test_what_the_cases_hold() -> None:
    """So that none of the above passes for want of something to bring back."""

    def records(case: str) -> dict[str, LayerRecord]:
        return records_of(convert(CASES[case].build(), **CASES[case].options))

    found = records("MN")
    assert {key: record.batch_norm for key, record in found.items()} == {
        "conv1.weight": "bn1", "conv2.weight": "bn2", "up.weight": "bn3", "fc1.weight": None,
    }  # fmt: skip
    assert {key for key, record in found.items() if record.scale_outside} == set(found) - {"up.weight"}
    assert {key: record.mean for key, record in found.items()} == {
        **dict.fromkeys(found, "mn"),
        "up.weight": None,
    }
    assert {r.momentum for r in found.values() if r.mean} == {0.25}
    assert {key for key, record in found.items() if record.gained_bias} == {"fc1.weight"}
    assert {key for key, r in records("MN beside batch norm").items() if r.gained_bias} == {
        "conv1.weight",
        "fc1.weight",
    }
    assert {r.kind for r in records("unit norm").values()} == {"unit", "sp"}
    plain = records("plain, batch norm folded")
    assert {(r.kind, r.batch_norm) for r in plain.values()} == {("sp", "bn1"), ("sp", "bn2"), ("sp", "bn3")}
    one = records("one layer, batch norm folded")
    assert {key: r.kind for key, r in one.items()} == {
        "conv1.weight": "sp",
        "conv2.weight": "gmp",
        "up.weight": "sp",
    }
    lstm = records("LSTM, MN")
    assert len(lstm) == 12  # two layers, two directions, input, state and projection
    assert {key for key, r in lstm.items() if r.mean} == {"lstm.weight_ih_l0", "lstm.weight_ih_l0_reverse"}
    assert [record.bias for record in records("zero rows").values()] == ["bias", "lambda_", None]
    model = convert(CASES["tied"].build(), "gmp")
    assert {"a.theta", "b.theta", "again.0.theta"} in tied(model)
    # A file has tensors under every name, and its readers no network.
    assert set(records_of(model)) == {"a.weight", "b.weight", "again.0.weight"}


GOLDEN = LayerRecord(
    "gmp",
    WeightSpec((16, 3, 5, 5), "F16", UnitAxis(1, 2), (6,), "BF16", "F32", "equator"),
    "lambda_",
    scale_outside=True,
    mean="mn",
    momentum=0.25,
    gained_bias=True,
    batch_norm="block.bn",
)
TEXT = (
    '{"layers":{"block.conv.weight":{"axis":1,"batch_norm":"block.bn","bias":"lambda_","bias_dtype":"BF16",'
    '"bias_shape":[6],"dtype":"F16","fan_in":200,"gained_bias":true,"groups":2,"kind":"gmp","mean":"mn",'
    '"momentum":0.25,"scale":"outside","shape":[16,3,5,5],"stored":"F32","theta_origin":"equator"}},"version":1}'
)


def test_every_field_in_golden_text() -> None:
    assert metadata.dump({"block.conv.weight": GOLDEN}) == TEXT
    assert metadata.load(TEXT, "file") == {"block.conv.weight": GOLDEN}
    several = replace(GOLDEN, more_batch_norms=("block.bn2",))
    text = TEXT.replace('"block.bn"', '["block.bn","block.bn2"]')
    assert metadata.dump({"block.conv.weight": several}) == text
    assert metadata.load(text, "file") == {"block.conv.weight": several}


@pytest.mark.parametrize(
    "change",
    [
        {"scale": "left"}, {"scale": None}, {"scale": "outside", "kind": "wn"}, {"scale": "outside", "bias": "bias"},
        {"mean": "max"}, {"mean": True}, {"mean": "mn", "kind": "sp"},
        {"momentum": "x"}, {"momentum": None}, {"momentum": -0.1}, {"momentum": 1.5}, {"momentum": float("nan")},
        {"gained_bias": "yes"}, {"gained_bias": 1}, {"gained_bias": None},
        {"gained_bias": True, "bias": None}, {"batch_norm": 3}, {"batch_norm": ["bn"]}, {"batch_norm": ""},
        {"batch_norm": []}, {"batch_norm": ["bn", ""]}, {"batch_norm": ["bn", "bn"]}, {"batch_norm": ["bn", ["bn2"]]},
        {"kind": "sp", "batch_norm": None, "mean": None, "scale": "inside"},
    ],
)  # fmt: skip
def test_malformed_fields_are_refused(change: dict[str, Any]) -> None:
    value = json.loads(TEXT)
    value["layers"]["block.conv.weight"] |= change
    with pytest.raises(CheckpointError) as caught:
        metadata.load(json.dumps(value), "model.safetensors")
    assert str(caught.value).startswith("model.safetensors: unusable `reparam` metadata")
    assert "\n" not in str(caught.value)


def test_other_architectures_are_told_what_is_missing(tmp_path: Path) -> None:
    records = records_of(convert(normed(), **CASES["MN"].options))

    def against(model: nn.Module, message: str) -> None:
        with pytest.raises(ArchitectureError) as caught:
            apply_records(model, records)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    without = normed()
    del without.bn2
    against(without, "the file has the batch norm `bn2` folded into `conv2`, Sequential has no `bn2`")
    gelu = normed()
    gelu.relu = nn.GELU()
    against(
        gelu,
        "`conv1`: the file says that its place scale was done, which is not possible in this architecture",
    )
    del gelu.fc1
    against(gelu, "`fc1.weight`: the file holds this layer, Sequential does not")


def test_a_sign_that_stayed_is_for_onnx_alone() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(x) + x

    model = convert(randomized(Residual()), include=["*"])
    assert len(records_of(model)) == 2
    with torch.no_grad():
        model.a.r[0] *= -1
    with pytest.raises(
        ArchitectureError, match="a negative r before what is not linear left a multiplication"
    ):
        records_of(fold(model))
    with pytest.raises(ArchitectureError, match="left a multiplication"):
        records_of(nn.Sequential(fold(model)))


def test_a_buffer_named_like_a_sign_is_the_users_own(tmp_path: Path) -> None:
    def build() -> nn.Module:
        plain = normed()
        plain.register_buffer("plus_sign", torch.ones(3))
        return plain

    model = convert(build(), "gmp")
    assert difference(there_and_back(model, build(), tmp_path / "model.safetensors"), model, X) <= EXACT


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("batch norm folded", "its scale stands after the activation"),
        ("MBN", "its mean is normalized"),
        ("plain, batch norm folded", "the batch norm bn1 is folded into it"),
        ("a mean folded", "it has a bias that mean normalization gave it"),
        ("unit norm", "the batch norm"),
    ],
)
def test_such_a_file_needs_its_network(case: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if case == "a mean folded":
        model = fold(convert(CASES["MN beside batch norm"].build(), **CASES["MN beside batch norm"].options))
    else:
        model = convert(CASES[case].build(), **CASES[case].options)
    save_state_dict(model.state_dict(), records_of(model), path)
    to = "wn" if case in ("plain, batch norm folded", "a mean folded") else "sp"
    line = refused(
        "convert", path, "--to", to, "-o", tmp_path / "out.safetensors", naming=("--arch",), leaving=tmp_path
    )
    assert "conv1" in line
    assert says in line
    listed = done("inspect", path, "--json").json
    assert {layer["name"] for layer in listed["layers"]} >= {"conv1", "conv2", "fc2"}
    assert run("inspect", path).code == 0


@pytest.mark.parametrize("through", ["one", "wn", "gmp, MN"])
@pytest.mark.parametrize("case", ["MN", "MBN", "MN beside batch norm"])
def test_a_bias_that_stayed_from_a_mean_loads_again(case: str, through: str, tmp_path: Path) -> None:
    """Folded, the plain layer has a bias that the user's class has not: the file says so, wherever it goes next."""
    model = moved(convert(CASES[case].build(), **CASES[case].options))
    plain = convert(model, "sp")
    assert plain.fc1.bias is not None
    if through != "one":
        options = {"mean_norm": True, "calibrate": [X]} if through == "gmp, MN" else {}
        plain = convert(plain, through.partition(",")[0], **options)
    records = records_of(plain)
    assert records["fc1.weight"].gained_bias
    assert not records["conv2.weight"].gained_bias if "conv2.weight" in records else through == "one"
    found = there_and_back(plain, normed(), tmp_path / "plain.safetensors")
    assert difference(found, model, X) <= EXACT
    assert records_of(found) == records
    assert_same_bits(found.state_dict(), plain.state_dict())
    assert difference(fold(found), model, X) <= EXACT


def test_a_class_with_the_bias_is_taken_as_it_is(tmp_path: Path) -> None:
    model = convert(CASES["MN"].build(), **CASES["MN"].options)
    records = records_of(plain := convert(model, "sp"))
    own = normed()
    own.fc1 = nn.Linear(4, 3).double()
    found = apply_records(own, records)
    load_into(found, plain.state_dict(), "file")
    assert difference(found.eval(), model, X) <= EXACT
    assert not records_of(found).get("fc1.weight")


def test_folded_batch_norms_are_found_in_a_copy() -> None:
    model = convert(normed(), **CASES["MN"].options)
    assert [m.into for m in model.modules() if isinstance(m, FoldedBatchNorm)] == ["conv1", "conv2", "up"]
    assert records_of(convert(model, "wn"))["conv2.weight"].batch_norm == "bn2"
