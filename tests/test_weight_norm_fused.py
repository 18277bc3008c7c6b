"""g·v/‖v‖ by torch's fused kernel: the value and every derivative, what it is left out for, and layers that use it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from reparam.kernels import weight_norm
from reparam.kernels.weight_norm import compose, composed, fused_axis
from reparam.layers import Reparameterized, layer_class

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


@cases
def test_value_and_gradients_against_float64(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    """Of a g and a gradient that are not contiguous."""
    g, v, axes = tensors(v_shape, g_shape, torch.float32)
    g = torch.stack([g.detach(), g.detach() + 1], dim=-1)[..., 0].requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (g, v)]
    expected = wide[0] * wide[1] / wide[1].square().sum(axes, keepdim=True).sqrt()
    assert fused_axis(g, v, axes) is not None
    found = compose(g, v, axes)
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
    assert fused_axis(g, v, axes) is not None

    def weight(g: Tensor, v: Tensor) -> Tensor:
        return compose(g, v, axes)

    assert torch.autograd.gradcheck(weight, (g, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weight, (g, v))


@pytest.mark.parametrize("at", [0, -1])  # contiguous tensors, and others
@cases
def test_vmap(v_shape: tuple[int, ...], g_shape: tuple[int, ...], at: int) -> None:
    g, v, axes = tensors(v_shape, g_shape, torch.float64)
    many = torch.stack([v, 2 * v + 1, -v], dim=at).detach()

    def loss(g: Tensor, v: Tensor) -> Tensor:
        return compose(g, v, axes).pow(3).sum()

    mapped = torch.vmap(lambda g, v: compose(g, v, axes), in_dims=(None, at))(g, many)
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, at))(g.detach(), many)
    for i, one in enumerate(many.unbind(at)):
        torch.testing.assert_close(mapped[i], composed(g, one, axes), rtol=1e-14, atol=1e-14)
        expected = torch.func.grad(lambda g, v: composed(g, v, axes).pow(3).sum(), (0, 1))(g.detach(), one)
        for found, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[i], right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("v_shape", "g_shape"), OTHERS.values(), ids=OTHERS)
def test_other_axes_are_left_to_torchs_operations(v_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    g, v, axes = tensors(v_shape, g_shape, torch.float64)
    assert fused_axis(g, v, axes) is None
    expected = g * v / v.square().sum(axes, keepdim=True).sqrt()
    torch.testing.assert_close(compose(g, v, axes), expected, rtol=1e-14, atol=1e-14)


def test_only_what_torch_has_a_kernel_for() -> None:
    g, v = torch.ones(4, 1, 1, 1), torch.ones(4, 3, 2, 2)
    assert fused_axis(g, v, (1, 2, 3)) == 0
    assert fused_axis(g, v.to(memory_format=torch.channels_last), (1, 2, 3)) is None
    assert fused_axis(g.half(), v.half(), (1, 2, 3)) is None
    assert fused_axis(g.to("meta"), v.to("meta"), (1, 2, 3)) is None
    assert fused_axis(torch.ones(4), torch.ones(4), ()) is None


def test_forward_mode_of_several_levels() -> None:
    """In a function of one's own torch drops the outer ones: zero for the second derivative of x³."""
    g, v, axes = tensors(*CASES["linear"], torch.float64)
    g, v = g.detach(), v.detach()
    along = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def along_v(v: Tensor) -> Tensor:
        return torch.func.jvp(lambda v: compose(g, v, axes), (v,), (along,))[1]

    found = torch.func.jvp(along_v, (v,), (along,))[1]
    step = 1e-4
    expected = (
        compose(g, v + step * along, axes) - 2 * compose(g, v, axes) + compose(g, v - step * along, axes)
    ) / step**2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v.requires_grad_(), along)
        (gradient,) = torch.autograd.grad(
            compose(g, dual, axes).pow(2).sum() + compose(g, dual, axes).sum(), v
        )
        assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_is_saved(tmp_path: Path) -> None:
    layer, x = a_layer(nn.Linear(6, 3)), torch.ones(2, 6)
    torch.jit.save(torch.jit.trace(layer, x), tmp_path / "layer.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(x), layer(x), rtol=1e-6, atol=1e-6)


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


def test_a_unit_that_only_decays_stays_finite() -> None:
    """It never fires, so that weight decay alone moves its v, to where float32 has no squares, and on to zero."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 2)
    with torch.no_grad():
        plain.bias[0] = -100.0
    layer, x = a_layer(plain), torch.rand(8, 4)
    optimizer = torch.optim.SGD([layer.weight_v], lr=1.0, weight_decay=0.2)
    sizes = []
    for _ in range(500):
        optimizer.zero_grad()
        (1e-3 * layer(x).relu().square().sum()).backward()
        optimizer.step()
        sizes.append(float(layer.weight_v[0].detach().norm()))
        assert bool(layer.composed().isfinite().all())
    assert any(1e-30 < size < 1e-20 for size in sizes)
    assert sizes[-1] == 0


@pytest.mark.parametrize("size", [1.0, 0.0])
def test_a_composed_weight_may_be_written_to(size: float) -> None:
    """Whichever way it was composed: it is nobody's view."""
    layer = a_layer(nn.Linear(6, 4))
    with torch.no_grad():
        layer.weight_v[1] *= size
    weight = layer.weight
    expected = 2 * weight.detach()
    weight *= 2
    weight.sum().backward()
    assert torch.equal(weight, expected)


def test_make_fx_traces_a_layer() -> None:
    layer, x = a_layer(nn.Linear(6, 4)), torch.ones(2, 6)
    torch.testing.assert_close(make_fx(layer)(x)(x), layer(x), rtol=1e-6, atol=1e-6)


def test_what_has_no_values_of_its_own() -> None:
    """Under a mode that computes shapes alone nothing may be asked of values."""
    layer = a_layer(nn.Linear(6, 4))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in layer.named_parameters()}
        out = torch.func.functional_call(layer, fake, torch.ones(2, 6))
        assert out.shape == (2, 4)


@pytest.mark.parametrize("form", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compose_alike(form: Callable[[nn.Module], nn.Module]) -> None:
    layer = a_layer(nn.Linear(6, 4))
    assert torch.equal(form(layer).weight, layer.weight)
