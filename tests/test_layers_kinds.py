"""Every layer kind in every parameterization against its plain layer, float64 the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layer_cases import FORMS, KINDS, SEVERAL, Conv1D, flat, inputs, perturb, plain_layer, relative_error
from torch import nn

from reparam.checkpoint import dialects
from reparam.errors import ArchitectureError, ReparamError
from reparam.layers import LAYERS, Reparameterized, layer_class

EXACT = 1e-12

GRID = [(form, kind) for form in FORMS for kind in KINDS]


def reparameterized(form: str, plain: nn.Module) -> Reparameterized:
    cls = layer_class(form, type(plain))
    assert cls is not None
    return cls.from_plain(plain)


@pytest.mark.parametrize(("form", "kind"), GRID)
class TestEveryLayer:
    def test_computes_what_the_plain_layer_computes(self, form: str, kind: str) -> None:
        plain, x = plain_layer(kind), inputs(kind)
        layer = reparameterized(form, plain)
        if form == "unit":  # the scale is pushed on: it is the plain layer of rows and biases divided by it
            with torch.no_grad():
                for name, held in layer.held.items():
                    unit, weight = held.spec.unit, getattr(plain, name)
                    scale = torch.linalg.vector_norm(unit.to_rows(weight), dim=1) + 1e-8
                    weight.copy_(unit.from_rows(unit.to_rows(weight) / scale[:, None], weight.shape))
                    if held.bias_role is not None:
                        getattr(plain, held.bias_name).div_(scale)
        assert relative_error(layer(*x), plain(*x)) <= EXACT
        assert isinstance(layer, type(plain))
        layer.eval(), plain.eval()
        with torch.no_grad():
            assert relative_error(layer(*x), plain(*x)) <= EXACT

    def test_folds_to_the_plain_class_after_any_change(self, form: str, kind: str) -> None:
        plain, x = plain_layer(kind), inputs(kind)
        layer = perturb(reparameterized(form, plain))
        folded = layer.fold()
        assert type(folded) is type(plain)
        assert list(folded.state_dict()) == list(plain.state_dict())
        assert set(vars(folded)) == set(vars(plain))
        plain.load_state_dict(folded.state_dict(), strict=True)
        for mode in (True, False):
            assert relative_error(folded.train(mode)(*x), layer.train(mode)(*x)) <= EXACT
            assert relative_error(plain.train(mode)(*x), layer(*x)) <= EXACT

    def test_keys_are_the_files(self, form: str, kind: str) -> None:
        plain = plain_layer(kind)
        layer = reparameterized(form, plain)
        dialect = "gmp" if form == "gmp" else "weight_norm"  # unit norm's v is named as weight norm's
        keys = {
            dialects.key_of(dialect, name, role)
            for name, record in layer.records().items()
            for role in layer.form.tensors(record.spec, record.bias)
        }
        replaced = {part for name, held in layer.held.items() for part in (name, held.bias_name)}
        others = set(plain.state_dict()) - replaced
        assert set(layer.state_dict()) == keys | others
        assert {k for k, _ in layer.named_parameters()} == keys | others
        if form != "unit":
            fresh = type(layer).from_records(plain_layer(kind), layer.records())
            fresh.load_state_dict(layer.state_dict(), strict=True)
            assert torch.equal(flat(fresh(*inputs(kind))), flat(layer(*inputs(kind))))

    def test_gradients_are_those_of_the_formula(self, form: str, kind: str) -> None:
        layer, x = perturb(reparameterized(form, plain_layer(kind)), 0.1), inputs(kind)
        named = {name: value for name, value in layer.named_parameters() if value.requires_grad}

        def forward(*values: torch.Tensor) -> torch.Tensor:
            return flat(torch.func.functional_call(layer, dict(zip(named, values, strict=True)), x))

        assert torch.autograd.gradcheck(forward, tuple(named.values()), rtol=1e-6, atol=1e-7, fast_mode=True)

    def test_copies_pickles_and_keeps_its_inputs_apart(self, form: str, kind: str) -> None:
        plain, x = plain_layer(kind), inputs(kind)
        before = copy.deepcopy(plain.state_dict())
        layer = reparameterized(form, plain)
        expected = flat(layer(*x))
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(copied) is type(layer)
            assert torch.equal(flat(copied(*x)), expected)
            perturb(copied)
        perturb(layer.fold())
        assert torch.equal(flat(layer(*x)), expected)
        perturb(layer)
        assert all(torch.equal(plain.state_dict()[key], value) for key, value in before.items())

    @pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
    def test_narrow_layers_keep_their_angles_and_scales(self, form: str, kind: str) -> None:
        plain = plain_layer(kind, torch.float32)
        layer = reparameterized(form, plain).to(torch.bfloat16)
        wide = {"r", "theta", "lambda_"}
        for name, parameter in layer.named_parameters():
            leaf = name.rpartition(".")[2]
            assert (parameter.dtype == torch.float32) == (leaf in wide or leaf.endswith("_g")), name
        assert flat(layer(*inputs(kind, torch.bfloat16))).dtype == torch.bfloat16
        assert {p.dtype for p in layer.fold().parameters()} == {torch.bfloat16}
        assert {p.dtype for p in layer.double().parameters()} == {torch.float64}
        assert flat(layer(*inputs(kind))).dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_stay_frozen(form: str, frozen: str) -> None:
    plain = plain_layer("linear")
    plain.weight.requires_grad = frozen == "bias"
    plain.bias.requires_grad = frozen == "weight"
    layer = reparameterized(form, plain)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data.add_(0.3)
    assert torch.equal(layer.weight, weight) == (frozen in ("weight", "both"))
    assert torch.equal(layer.bias, bias) == (frozen in ("bias", "both"))
    folded = layer.fold()
    assert (folded.weight.requires_grad, folded.bias.requires_grad) == (
        plain.weight.requires_grad,
        plain.bias.requires_grad,
    )


def test_attributes_that_plain_code_reads() -> None:
    plain = plain_layer("attention")
    layer = reparameterized("gmp", plain)
    part = layer.in_proj_weight
    assert (part.shape, part.dtype) == (plain.in_proj_weight.shape, torch.float64)
    torch.testing.assert_close(torch.abs(part), plain.in_proj_weight.abs(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(layer.in_proj_bias, plain.in_proj_bias, rtol=EXACT, atol=EXACT)
    assert layer.get_parameter("in_proj_weight.theta").shape == (12, 3)
    lstm = reparameterized("wn", plain_layer("lstm"))
    torch.testing.assert_close(lstm.weight_ih_l0, plain_layer("lstm").weight_ih_l0, rtol=EXACT, atol=EXACT)
    assert lstm.all_weights[0][0].shape == (16, 3)
    with pytest.raises(AttributeError):
        _ = layer.no_such_name


def test_recurrent_layers_check_their_input_as_torch_does() -> None:
    plain = plain_layer("rnn")
    layer = reparameterized("gmp", plain)
    for x in (torch.ones(4, 2, 3), torch.ones(4, 2, 5).double(), torch.ones(2, 4, 2, 3).double()):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            plain(x)
        with pytest.raises(type(expected.value)):
            layer(x)


def test_packed_sequences() -> None:
    plain = plain_layer("lstm")
    x = nn.utils.rnn.pack_padded_sequence(inputs("lstm")[0], torch.tensor([4, 2]))
    found, expected = reparameterized("gmp", plain)(x)[0].data, plain(x)[0].data
    assert relative_error(found, expected) <= EXACT


def test_reset_parameters_draws_as_the_plain_class_does() -> None:
    for form in ("gmp", "wn"):
        plain, layer = plain_layer("linear"), reparameterized(form, plain_layer("linear"))
        torch.manual_seed(4)
        plain.reset_parameters()
        torch.manual_seed(4)
        layer.reset_parameters()
        torch.testing.assert_close(layer.weight, plain.weight, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(layer.bias, plain.bias, rtol=EXACT, atol=EXACT)


def test_only_the_exact_class_is_matched() -> None:
    class Mine(nn.Linear):
        pass

    assert layer_class("gmp", Mine) is None
    assert layer_class("gmp", nn.BatchNorm2d) is None
    assert layer_class("sp", nn.Linear) is None
    assert layer_class("gmp", Conv1D).__name__ == "GmPConv1D"
    assert {plain for _, plain in LAYERS} >= {nn.Linear, nn.LSTM, nn.MultiheadAttention}


def test_records_of_another_kind_of_layer_are_refused() -> None:
    layer = reparameterized("gmp", plain_layer("transposed2d"))
    wrong = {"weight": copy.deepcopy(layer.record())}
    turned = nn.Conv2d(3, 5, 3)
    with pytest.raises(ArchitectureError, match="the file's weight is"):
        layer_class("gmp", nn.Conv2d).from_records(turned, wrong)
    square = plain_layer("transposed2d square")
    record = layer_class("gmp", nn.Conv2d).from_plain(nn.Conv2d(3, 3, 2, bias=False)).record()
    with pytest.raises(ArchitectureError, match="--axis GLOB=1"):
        layer_class("gmp", type(square)).from_record(square, record)
    with pytest.raises(ArchitectureError, match="no parameter `weight_hr_l0`"):
        layer_class("gmp", nn.LSTM).from_records(nn.LSTM(3, 4), {"weight_hr_l0": record})


@pytest.mark.parametrize("kind", SEVERAL)
def test_scales_of_layers_with_several_weights_stay_inside(kind: str) -> None:
    with pytest.raises(ReparamError, match="has to stand inside"):
        layer_class("gmp", type(plain_layer(kind))).from_plain(plain_layer(kind), scale_outside=True)
