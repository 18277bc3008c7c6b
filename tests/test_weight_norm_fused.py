"""g·v/‖v‖ by torch's fused kernel: the value and every derivative, and that nothing it cannot hold is given to it."""

from __future__ import annotations

import copy
import pickle

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reparam.kernels import weight_norm
from reparam.kernels.weight_norm import composed, fused, fused_axis, is_ordinary
from reparam.layers import LAYERS, Reparameterized, layer_class

# v, g: the norm over all but the first axis, over all but the last, over a single row.
CASES = {
    "linear": ((5, 7), (5, 1)),
    "conv": ((4, 3, 3, 2), (4, 1, 1, 1)),
    "last axis": ((3, 2, 6), (1, 1, 6)),
    "one row": ((1, 9), (1, 1)),
    "rows of one": ((6, 1), (6, 1)),
}
# Not its axes, none at all, one number; g alone of a shape that torch's dim=None has.
OTHERS = {"middle": ((3, 4, 5), (1, 4, 1)), "all of several": ((3, 4), (1, 1)), "scalar": ((3, 4), ())}
FLOAT32 = 2e-7  # a row's error where rows are short: two roundings
cases = pytest.mark.parametrize(("v_shape", "g_shape"), CASES.values(), ids=CASES)


def tensors(
    v_shape: tuple[int, ...], g_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    g, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (g_shape, v_shape))
    axes = tuple(i for i in range(len(v_shape)) if not g_shape or g_shape[i] == 1)
    return g.to(dtype).requires_grad_(), v.to(dtype).requires_grad_(), axes


def axis_of(g: Tensor, v: Tensor, axes: tuple[int, ...]) -> int:
    axis = fused_axis(g, v, axes)
    assert axis is not None
    return axis


@cases
def test_value_and_gradients_against_float64(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    """Of a g and a gradient that are not contiguous."""
    g, v, axes = tensors(v_shape, g_shape, torch.float32)
    g = torch.stack([g.detach(), g.detach() + 1], dim=-1)[..., 0].requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (g, v)]
    expected = wide[0] * wide[1] / wide[1].square().sum(axes, keepdim=True).sqrt()
    found = fused(g, v, axis_of(g, v, axes))
    toward = torch.randn(*v_shape, 2, generator=torch.Generator().manual_seed(1))[..., 0]
    torch.testing.assert_close(found.double(), expected, rtol=FLOAT32, atol=FLOAT32)
    for one, other in zip(
        torch.autograd.grad(found, (g, v), toward),
        torch.autograd.grad(expected, wide, toward.double()),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own, on the way to forward mode
@cases
def test_derivatives_of_first_and_second_order(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    """Forward and backward, one by one and batched, and the second derivative, which torch's own has wrong."""
    g, v, axes = tensors(v_shape, g_shape, torch.float64)
    axis = axis_of(g, v, axes)

    def weight(g: Tensor, v: Tensor) -> Tensor:
        return fused(g, v, axis)

    assert torch.autograd.gradcheck(weight, (g, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weight, (g, v))


@cases
def test_vmap(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    g, v, axes = tensors(v_shape, g_shape, torch.float64)
    axis = axis_of(g, v, axes)
    many = torch.stack([v, 2 * v + 1, -v], dim=-1).detach()

    def loss(g: Tensor, v: Tensor) -> Tensor:
        return fused(g, v, axis).pow(3).sum()

    mapped = torch.vmap(lambda g, v: fused(g, v, axis), in_dims=(None, -1))(g, many)
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, -1))(g.detach(), many)
    for i, one in enumerate(many.unbind(-1)):
        torch.testing.assert_close(mapped[i], composed(g, one, axes), rtol=1e-14, atol=1e-14)
        expected = torch.func.grad(lambda g, v: composed(g, v, axes).pow(3).sum(), (0, 1))(g.detach(), one)
        for found, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[i], right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("v_shape", "g_shape"), OTHERS.values(), ids=OTHERS)
def test_other_axes_are_left_to_torchs_operations(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    g, v, axes = tensors(v_shape, g_shape, torch.float64)
    assert fused_axis(g, v, axes) is None
    expected = g * v / v.square().sum(axes, keepdim=True).sqrt()
    for ordinary in (False, True):
        torch.testing.assert_close(composed(g, v, axes, ordinary), expected, rtol=1e-14, atol=1e-14)


def test_only_what_torch_has_a_kernel_for() -> None:
    g, v = torch.ones(4, 1, 1, 1), torch.ones(4, 3, 2, 2)
    assert fused_axis(g, v, (1, 2, 3)) == 0
    assert fused_axis(g, v.to(memory_format=torch.channels_last), (1, 2, 3)) is None
    assert fused_axis(g.half(), v.half(), (1, 2, 3)) is None
    assert fused_axis(g.to("meta"), v.to("meta"), (1, 2, 3)) is None
    assert fused_axis(torch.ones(4), torch.ones(4), ()) is None


@pytest.mark.parametrize("bad", [0.0, 1e-12, 1e12, torch.nan, torch.inf])
def test_a_single_row_out_of_the_ordinary(bad: float) -> None:
    g, v = torch.ones(3, 1), torch.ones(3, 4)
    assert is_ordinary(g, v, (1,))
    v[1] *= bad
    assert not is_ordinary(g, v, (1,))


def test_a_scale_out_of_the_ordinary_and_no_rows() -> None:
    for g, fits in ((0.0, True), (-1e12, True), (1e30, False), (torch.nan, False), (-torch.inf, False)):
        assert is_ordinary(torch.tensor([[1.0], [g]]), torch.ones(2, 4), (1,)) == fits
    assert not is_ordinary(torch.ones(0, 1), torch.ones(0, 4), (1,))


def test_no_value_is_waited_for() -> None:
    """Else a CUDA graph could not hold it: tensors without values stand for those of a device."""
    with FakeTensorMode():
        g, v = (torch.ones(shape, requires_grad=True) for shape in ((4, 1), (4, 9)))
        weight = fused(g, v, axis_of(g, v, (1,)))
        assert [t.shape for t in torch.autograd.grad(weight.sum(), (g, v))] == [(4, 1), (4, 9)]
        g, v = (torch.ones(shape, device="cuda") for shape in ((4, 1), (4, 9)))
        assert fused(g, v, axis_of(g, v, (1,))).device.type == "cuda"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The axis of every weight composed by the fused kernel."""
    made: list[int] = []
    own = torch._weight_norm_interface

    def counted(v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        made.append(dim)
        return own(v, g, dim)

    monkeypatch.setattr(weight_norm.torch, "_weight_norm_interface", counted)
    return made


def a_layer(plain: nn.Module) -> Reparameterized:
    cls = layer_class("wn", type(plain))
    assert cls is not None
    return cls.from_plain(plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 3),
        lambda: nn.Conv2d(2, 4, 3, groups=2),
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.GRU(3, 4),
        lambda: nn.LSTMCell(3, 4),
    ],
)
def test_layers_use_it(make: type[nn.Module], calls: list[int]) -> None:
    torch.manual_seed(0)
    plain = make()
    layer = a_layer(plain)
    for name in layer.held:
        found, expected = getattr(layer, name), plain.get_parameter(name).detach()
        assert oracles.row_errors(found.detach().flatten(1), expected.flatten(1)).max() <= FLOAT32
    assert calls == [0] * len(layer.held)


def broken(layer: nn.Module) -> dict[str, Tensor]:
    """A state whose second row has no direction, its third one a norm whose square float32 does not hold."""
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight_v"][1] = 0
    state["weight_v"][2] *= 1e30
    return state


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_loaded_decides(assign: bool, calls: list[int]) -> None:
    layer = a_layer(nn.Linear(6, 4))
    model = nn.Sequential(nn.ReLU(), layer)
    good, bad = copy.deepcopy(model.state_dict()), {f"1.{k}": v for k, v in broken(layer).items()}
    expected = layer.composed().detach()
    assert len(calls) == 1
    model.load_state_dict(bad, assign=assign)
    weight = layer.composed()
    assert len(calls) == 1
    torch.testing.assert_close(weight[2].detach(), expected[2], rtol=1e-6, atol=1e-7)
    assert torch.equal(weight[1].detach(), torch.zeros(6))
    weight.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for n, p in layer.named_parameters() if n != "bias")
    model.load_state_dict(good, assign=assign)
    assert torch.equal(layer.composed(), expected)
    assert len(calls) == 2


def test_values_written_otherwise(calls: list[int]) -> None:
    layer = a_layer(nn.Linear(6, 4))
    with torch.no_grad():
        layer.load_state_dict(broken(layer))
        layer.assign(torch.randn(4, 6), torch.zeros(4))
        layer.composed()
        assert len(calls) == 1
        layer.weight_v[1] = 0
        layer.settle()
        assert torch.equal(layer.composed()[1], torch.zeros(6))
        assert len(calls) == 1


def test_a_cast_decides_again(calls: list[int]) -> None:
    """A row that float32 holds and float16 does not."""
    layer = a_layer(nn.Linear(6, 4))
    with torch.no_grad():
        layer.weight_v[1] = 1e-8
        layer.settle()
    layer.composed()
    assert len(calls) == 1
    assert torch.equal(layer.half().composed()[1], torch.zeros(6, dtype=torch.float16))
    assert len(calls) == 1


def test_layers_without_values_and_copies(calls: list[int]) -> None:
    layer = a_layer(nn.Linear(6, 4))
    empty = LAYERS["wn", nn.Linear].from_records(nn.Linear(6, 4), layer.records())
    assert torch.equal(empty.composed(), torch.zeros(4, 6))
    assert calls == []
    hollow = copy.deepcopy(layer).to("meta")
    assert not hollow.held["weight"].ordinary
    hollow.load_state_dict(layer.state_dict(), assign=True)
    for one in (hollow, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(one.composed(), layer.composed())
    assert len(calls) == 6
