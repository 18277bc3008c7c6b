"""Architectures by reference, strict loading, and models swapped layer by layer and folded back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from reparam.checkpoint.metadata import LayerRecord
from reparam.errors import ArchitectureError
from reparam.graph import apply_records, fold, load_architecture, load_into
from reparam.graph.exchange import replace_modules
from reparam.layers import LAYERS, GeometricMixin, GmPConv2d, GmPLinear

EXACT = 1e-12


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.Linear(8, 3)
    )


def to_gmp(model: nn.Module) -> nn.Module:
    return replace_modules(
        model, lambda m: LAYERS["gmp", type(m)].from_plain(m) if ("gmp", type(m)) in LAYERS else None
    )


def records_of(model: nn.Module) -> dict[str, LayerRecord]:
    return {f"{k}.weight": m.record() for k, m in model.named_modules() if isinstance(m, GeometricMixin)}


def test_a_checkpoint_loads_strict_into_the_swapped_model() -> None:
    source = to_gmp(a_model().double()).eval()
    tensors, records = source.state_dict(), records_of(source)
    torch.manual_seed(9)
    fresh = nn.Sequential(*a_model().children()).double()
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    model = apply_records(fresh, records)
    load_into(model, tensors, "file")
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert [type(model[i]) for i in (0, 4, 5)] == [GmPConv2d, GmPLinear, GmPLinear]
    assert torch.equal(model.eval()(x), source(x))
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in before.items())


def test_theta_keeps_the_precision_it_is_stored_in() -> None:
    source = to_gmp(a_model())
    records = {
        key: replace(record, spec=replace(record.spec, stored="F64"))
        for key, record in records_of(source).items()
    }
    model = apply_records(a_model(), records)
    assert model[4].theta.dtype == torch.float64
    assert model[4].weight.dtype == torch.float32


def test_fold_gives_the_original_keys_classes_and_values() -> None:
    plain = a_model().double().eval()
    swapped = to_gmp(plain)
    folded = fold(swapped)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = plain(x), folded(x)
    assert float((found - expected).abs().max() / expected.abs().max()) <= EXACT
    assert isinstance(swapped[0], GmPConv2d)
    a_model().load_state_dict(folded.state_dict(), strict=True)


def test_a_model_that_is_one_layer() -> None:
    plain = nn.Linear(3, 2)
    source = GmPLinear.from_plain(plain)
    model = apply_records(plain, {"weight": source.record()})
    load_into(model, source.state_dict(), "file")
    assert torch.equal(model.weight, source.weight)
    assert type(fold(model)) is nn.Linear


def test_a_layer_used_under_two_names_stays_one() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    swapped = to_gmp(model)
    assert swapped["a"] is swapped["b"][0]
    folded = fold(swapped)
    assert folded["a"] is folded["b"][0]


def test_records_that_do_not_fit_are_named() -> None:
    source = to_gmp(a_model())
    record = records_of(source)["4.weight"]
    cases = {
        "7.weight": (record, "`7.weight`: the file holds this layer, Sequential does not"),
        "4.weight": (replace(record, kind="bn"), "`4.weight`: no bn layer for the `weight` of Linear yet"),
        "1.weight": (record, "`1.weight`: no gmp layer for the `weight` of BatchNorm2d yet"),
        "4.bias": (record, "`4.bias`: no gmp layer for the `bias` of Linear yet"),
        "5.weight": (record, r"`5.weight`: the file's weight is \[8, 144\], the architecture's \[3, 8\]"),
    }
    for key, (bad, message) in cases.items():
        with pytest.raises(ArchitectureError, match=message):
            apply_records(a_model(), {key: bad})
    without = replace(record, bias=None, spec=replace(record.spec, bias_shape=None, bias_dtype=None))
    with pytest.raises(
        ArchitectureError, match=r"`4\.weight`: the file's layer has no bias, the architecture's has"
    ):
        apply_records(a_model(), {"4.weight": without})


def test_a_wrong_architecture_is_told_by_pattern() -> None:
    tensors = a_model().state_dict()
    other = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    with pytest.raises(ArchitectureError) as caught:
        load_into(other, tensors, "m.safetensors")
    message = str(caught.value)
    assert message.startswith("m.safetensors does not fit Sequential: missing from the file: ")
    assert "N.bias (8), N.weight (8)" in message
    assert "unknown to the architecture: 1.num_batches_tracked, 1.running_mean, 1.running_var" in message
    assert "0.weight is [4, 1, 3, 3] in the file, [2, 2] in the architecture" in message
    assert "\n" not in message


ARCH_FILE = """
from dataclasses import dataclass
from torch import nn
import sibling

@dataclass
class Config:
    width: int = 3

def build(width=3, name="x"):
    assert name == "x", name
    return nn.Linear(Config(width).width, sibling.OUT)

class Nested:
    make = staticmethod(lambda: nn.Linear(1, 1))

def broken():
    raise RuntimeError("no luck")

def number():
    return 3

constant = 7
"""


@pytest.fixture
def arch_file(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text("OUT = 2\n")
    file = tmp_path / "my model.py"
    file.write_text(ARCH_FILE)
    return file


def test_architectures_from_files_and_modules(arch_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(load_architecture(f"{arch_file}:build").weight.shape) == (2, 3)
    assert tuple(load_architecture(f"{arch_file}:build", {"width": "5", "name": "x"}).weight.shape) == (2, 5)
    assert isinstance(load_architecture(f"{arch_file}:Nested.make"), nn.Linear)
    assert isinstance(load_architecture("torch.nn:Identity"), nn.Identity)
    (arch_file.parent / "here_arch.py").write_text(ARCH_FILE)
    monkeypatch.chdir(arch_file.parent)
    assert isinstance(load_architecture("here_arch:build"), nn.Linear)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("resnet18", "expected pkg.module:callable or path/to/file.py:callable"),
        (":build", "expected pkg.module:callable"),
        ("FILE:", "expected pkg.module:callable"),
        ("nowhere.py:build", "no file `nowhere.py`"),
        ("FILE:missing", "has no `missing`"),
        ("FILE:constant", "`constant` is a int, not a callable"),
        ("FILE:broken", "`broken` raised RuntimeError: no luck"),
        ("FILE:number", "`number` returned a int, not an nn.Module"),
        ("BAD:build", "raised ZeroDivisionError: division by zero"),
        ("SYNTAX:build", "raised SyntaxError"),
        ("no_such_package.sub:build", "no module `no_such_package`"),
        ("torch.nn.no_such:build", "no module `torch.nn.no_such`"),
    ],
)
def test_a_reference_that_leads_nowhere_says_why(arch_file: Path, ref: str, message: str) -> None:
    for name, text in (("BAD", "1 / 0\n"), ("SYNTAX", "def (\n")):
        (arch_file.parent / f"{name.lower()}.py").write_text(text)
        ref = ref.replace(name, str(arch_file.parent / f"{name.lower()}.py"))
    ref = ref.replace("FILE", str(arch_file))
    with pytest.raises(ArchitectureError) as caught:
        load_architecture(ref)
    assert str(caught.value).startswith(f"--arch {ref}: ")
    assert message in str(caught.value)


def test_wrong_arguments_point_at_their_option(arch_file: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"unexpected keyword argument 'depth'.*--arch-arg"):
        load_architecture(f"{arch_file}:build", {"depth": "2"})


def test_a_file_from_before_the_batch_counter_loads() -> None:
    source = a_model()
    old = {
        key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    fresh = a_model()
    nn.init.zeros_(fresh[0].weight)
    load_into(fresh, old, "file")
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in source.state_dict().items())
