"""Unit norm brought in with its scale pushed on: the plain network in float64 is the oracle, in both modes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from graph_cases import EXACT, copied, difference, noise, randomized
from layer_cases import Conv1D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from examples.models.cifar_resnet import CifarResNet
from examples.models.mini_vgg import MiniVGG
from reparam.errors import NonFiniteError, ReparamError
from reparam.graph.capture import capture
from reparam.graph.inplace import fixed
from reparam.graph.rules.swap import swap_layers
from reparam.graph.rules.unit_norm import unit_norms
from reparam.layers import LAYERS, Reparameterized


class Net(nn.Module):
    """Two layers, and a function of the module and its input that puts them together."""

    def __init__(self, a: nn.Module, b: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.act, self.drop, self.bn = nn.ReLU(), nn.Dropout(0.4), nn.BatchNorm2d(4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(2, 4, 3, padding=1, **options)


def convs(run: Callable[[Any, Tensor], Tensor], **options: Any) -> nn.Module:
    return randomized(Net(conv(), nn.Conv2d(4, 6, 3, **options), run))


def flat(run: Callable[[Any, Tensor], Tensor], features: int = 4 * 30) -> nn.Module:
    return randomized(Net(conv(), nn.Linear(features, 5), run))


def sequential(*modules: nn.Module) -> nn.Module:
    return randomized(nn.Sequential(*modules))


def is_unit(model: nn.Module) -> list[str]:
    """The names of the layers in unit norm, whose rows are checked to have length 1."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Reparameterized):
            rows = module.record().spec.unit.to_rows(module.weight.detach())
            assert float((rows.norm(dim=1) - 1).abs().max()) <= 1e-6  # ε = 1e-8 of norms that are not small
            names.append(name)
    return names


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "module": (lambda: convs(lambda m, x: m.b(m.act(m.a(x)))), (2, 2, 6, 5), ["a"]),
    "no activation": (lambda: convs(lambda m, x: m.b(m.a(x))), (2, 2, 6, 5), ["a"]),
    "functional": (lambda: convs(lambda m, x: m.b(F.leaky_relu(m.a(x), -0.3))), (2, 2, 6, 5), ["a"]),
    "method": (lambda: convs(lambda m, x: m.b(m.a(x).relu())), (2, 2, 6, 5), ["a"]),
    "in place": (lambda: convs(lambda m, x: m.b(F.relu(m.a(x), inplace=True))), (2, 2, 6, 5), ["a"]),
    "in place, result dropped": (
        lambda: convs(lambda m, x: (torch.relu_(y := m.a(x)), m.b(y))[1]), (2, 2, 6, 5), ["a"],
    ),
    "prelu": (lambda: sequential(conv(), nn.PReLU(4), nn.Conv2d(4, 2, 2)), (2, 2, 6, 5), ["0"]),
    "pool and dropout": (
        lambda: convs(lambda m, x: m.b(m.drop(F.max_pool2d(m.act(m.a(x)), 2))), padding=2), (2, 2, 6, 5), ["a"],
    ),
    "grouped": (lambda: convs(lambda m, x: m.b(m.act(m.a(x))), groups=2), (2, 2, 6, 5), ["a"]),
    "transposed": (
        lambda: sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(),
            nn.Conv2d(4, 4, 2, groups=4, padding=1, padding_mode="reflect"),
        ), (2, 4, 3, 3), ["0", "2"],
    ),
    "one dimension": (
        lambda: sequential(nn.Conv1d(2, 4, 2), nn.AvgPool1d(2), nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(9, 2)),
        (2, 2, 9), ["0", "2"],
    ),
    "three dimensions": (
        lambda: sequential(nn.Conv3d(2, 4, 2), nn.MaxPool3d(2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2)),
        (2, 2, 5, 5, 5), ["0"],
    ),
    "linear": (
        lambda: sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), Conv1D(6, 7), nn.LeakyReLU(), nn.Linear(6, 2)),
        (2, 3, 5), ["0", "2"],
    ),
    "flattened": (lambda: flat(lambda m, x: m.b(m.act(m.a(x)).flatten(1))), (2, 2, 6, 5), ["a"]),
    "flattened by a function": (lambda: flat(lambda m, x: m.b(torch.flatten(m.a(x), 1))), (2, 2, 6, 5), ["a"]),
    "viewed": (lambda: flat(lambda m, x: m.b((y := m.a(x)).view(y.size(0), -1))), (2, 2, 6, 5), ["a"]),
    "viewed, by shape": (
        lambda: flat(lambda m, x: m.b(m.a(x).reshape((x.shape[0], 120)))), (2, 2, 6, 5), ["a"],
    ),
    "viewed, features -1 by the shape of the input": (
        lambda: flat(lambda m, x: m.b(m.act(m.a(x)).view(x.size()[0], -1))), (2, 2, 6, 5), ["a"],
    ),
    "viewed, by features: rows may be parts of samples": (
        lambda: flat(lambda m, x: m.b(m.a(x).view(-1, 120))), (2, 2, 6, 5), [],
    ),
    "viewed, by features that are the positions in space": (
        lambda: flat(lambda m, x: m.b(m.a(x).view(-1, 16)), 16), (2, 2, 4, 4), [],
    ),
    "viewed, by the samples before frames were put among them": (
        lambda: flat(lambda m, x: m.b(m.a(x.flatten(0, 1)).mean((2, 3)).reshape(x.size(0), -1)), 3 * 4),
        (2, 3, 2, 4, 4), [],
    ),
    "mean over space": (lambda: flat(lambda m, x: m.b(m.act(m.a(x)).mean((2, -1))), 4), (2, 2, 6, 5), ["a"]),
    "mean over one axis": (
        lambda: flat(lambda m, x: m.b(m.a(x).mean(-1).flatten(1)), 24), (2, 2, 6, 5), ["a"],
    ),
    "mean that keeps its axes": (
        lambda: convs(lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True)), padding=1), (2, 2, 6, 5), ["a"],
    ),
    "mean over one dimension": (
        lambda: randomized(Net(nn.Conv1d(2, 4, 2), nn.Linear(4, 3), lambda m, x: m.b(m.a(x).mean(2)))),
        (2, 2, 6), ["a"],
    ),
    "pooled and flattened": (
        lambda: flat(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), (1, 2)).flatten(1)), 8), (2, 2, 6, 5), ["a"],
    ),
    "two consumers": (
        lambda: convs(lambda m, x: (m.b(y := m.act(m.a(x))), m.extra(F.max_pool2d(y, 2)))), (2, 2, 6, 5), ["a"],
    ),
    "mini-VGG": (
        lambda: randomized(MiniVGG(2, 12, 3)), (2, 2, 12, 12), ["conv1", "conv2", "conv3", "conv4", "dense1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
@pytest.mark.parametrize("training", [False, True])
def test_what_the_network_computes_stays(case: str, training: bool) -> None:
    build, shape, expected = CHAINS[case]
    plain, x = build(), noise(*shape)
    if case == "two consumers":
        plain.extra = randomized(nn.Conv2d(4, 2, 2))
    if (
        case == "linear"
    ):  # torch.fx looks inside HF Conv1D: it is no layer of the graph, until it is reparameterized
        assert plain[2].weight.shape == (7, 6)
    model = copied(plain)
    found = unit_norms(model, [name for name, m in plain.named_modules() if hasattr(m, "weight")])
    assert [o.layer for o in found if o.applied] == expected
    assert is_unit(model) == expected
    assert difference(model.train(training), plain.train(training), x) <= EXACT


def test_the_last_layer_stays_plain_and_scales_go_front_to_back() -> None:
    plain = sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = copied(plain)
    first, second, last = unit_norms(model, ["4", "2", "0"])
    assert (first.why, second.why) == ("scale pushed into `2`", "scale pushed into `4`")
    assert (last.layer, last.applied, last.why) == ("4", False, "its output leaves the network")
    norms = plain[0].weight.norm(dim=1) + 1e-8
    torch.testing.assert_close(model[2].weight_v, plain[2].weight * norms, rtol=EXACT, atol=0)
    torch.testing.assert_close(model[0].bias, plain[0].bias / norms, rtol=EXACT, atol=0)
    assert torch.equal(model[0].weight_v, plain[0].weight)


def test_layers_are_taken_as_they_run_not_as_they_are_registered() -> None:
    plain = convs(lambda m, x: m.b(m.a(m.extra(x))))
    plain.extra = randomized(nn.Conv2d(2, 2, 1))
    model = copied(plain)
    found = unit_norms(model, ["a", "extra"])
    assert [(o.layer, o.applied) for o in found] == [("extra", True), ("a", True)]
    assert difference(model, plain, noise(2, 2, 6, 5)) <= EXACT


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (
            lambda m, x: m.b(F.relu6(m.a(x))),
            "`relu6` takes its output, and positive scales cannot be moved past",
        ),
        (lambda m, x: m.b(F.gelu(m.a(x))), "`gelu` takes its output"),
        (lambda m, x: m.b(m.a(x) + 1), "`add` adds another result to it"),
        (lambda m, x: m.b((y := m.a(x)) + F.relu(y)), "adds another result to it (a residual connection)"),
        (lambda m, x: m.b(operator.iadd(F.relu(m.a(x)), x[:, :1])), "a residual connection"),
        (lambda m, x: m.b(torch.cat([m.a(x)[:, :2], x], 1)), "`getitem` takes its output"),
        (lambda m, x: m.b(m.bn(m.a(x))), "`bn` (BatchNorm2d) takes its output: fold batch norm first"),
        (lambda m, x: m.b(m.b2(m.b2(F.relu(m.a(x))))), "`b2` is called 2 times"),
        (lambda m, x: m.b(m.a(x)) + m.b.weight.sum(), "the parameters of `b` are also read outside"),
        (lambda m, x: m.b(m.a(x)) + m.a.weight.sum(), "the parameters of `a` are also read outside"),
        (lambda m, x: m.b(m.a(F.pad(m.a(x), (0, 0)))[:, :4]), "`a` is called 2 times"),
        (lambda m, x: (m.b(y := m.a(x)), y), "its output leaves the network"),
        (lambda m, x: (m.a(x), m.b(x.repeat(1, 2, 1, 1)))[1], "nothing consumes its output"),
        (lambda m, x: m.b(F.prelu(x.repeat(1, 2, 1, 1), m.a(x).mean((0, 2, 3)))), "takes its output"),
        (lambda m, x: m.b(F.prelu(y := m.a(x), y)), "`prelu` takes its output"),
        (lambda m, x: m.b(m.a(x).permute(0, 1, 3, 2)), "`permute` takes its output"),
        (lambda m, x: m.b(m.a(x).mean(1, keepdim=True).repeat(1, 4, 1, 1)), "`mean` takes its output"),
        (
            lambda m, x: m.b(F.max_pool2d(m.a(x), 2, return_indices=True)[0]),
            "`max_pool2d_with_indices` takes its output",
        ),
        (lambda m, x: m.lin(m.a(x)), "`lin` (Linear) does not take its units as input channels"),
        (lambda m, x: m.row(m.a(x)), "`row` (Linear) does not take its units as input channels"),
        (lambda m, x: m.lin(m.a(x).flatten(2)), "`flatten` takes its output"),
        (
            lambda m, x: m.lin(m.a(x).view(x.size(1), -1)),
            "`view` takes its output, and need not keep its samples",
        ),
        (lambda m, x: m.lin((y := m.a(x)).view(y.shape[1], -1)), "write flatten(1)"),
        (lambda m, x: m.lin(m.a(x).view(-1, 5)), "write flatten(1)"),
        (lambda m, x: m.lin(m.a(x.transpose(0, 1)).reshape(x.shape[0], -1)), "write flatten(1)"),
        (lambda m, x: m.lin(m.a(x).view(2, 4, -1)), "`view` takes its output"),
        (lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x, "torch.fx cannot trace Net"),
    ],
)
def test_refused_where_the_scale_cannot_be_moved_on(
    run: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    model = convs(run, padding=1)
    model.b2 = randomized(nn.Conv2d(4, 4, 1))
    model.lin, model.row = randomized(nn.Linear(5, 3)), randomized(nn.Linear(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (found,) = unit_norms(model, ["a"])
    assert (found.layer, found.applied) == ("" if "trace" in reason else "a", False)
    assert reason in found.why
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _change(change: Callable[[Any], Any]) -> nn.Module:
    model = convs(lambda m, x: m.b(m.act(m.a(x))))
    change(model)
    return model.double()


def hooked(module: nn.Module, *args: Any) -> None:
    """Changes nothing."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "tied", m.b.weight), "`b` shares parameters with the model itself"),
        (lambda m: setattr(m, "tied", m.a.bias), "`a` shares parameters with the model itself"),
        (lambda m: parametrizations.weight_norm(m.a), "`a` is parametrized by torch"),
        (lambda m: nn.utils.spectral_norm(m.a), "computed by a hook of torch.nn.utils"),
        (lambda m: m.a.register_forward_hook(hooked), "its forward hooks"),
        (lambda m: m.act.register_forward_hook(hooked), "hooks of `act` take values"),
        (lambda m: m.b.register_forward_pre_hook(hooked), "hooks of `b` take values"),
        (lambda m: m.b.register_forward_hook(hooked), "hooks of `b` take values"),
        (lambda m: setattr(m.b, "forward", m.b.forward), "of `b` was replaced"),
        (lambda m: setattr(m.act, "forward", torch.sin), "of `act` was replaced"),
        (
            lambda m: setattr(m, "b", LAYERS["gmp", nn.Conv2d].from_plain(m.b)),
            "`b` is in the gmp parameterization",
        ),
        (
            lambda m: setattr(m, "a", LAYERS["wn", nn.Conv2d].from_plain(m.a)),
            "it is in the wn parameterization",
        ),
        (lambda m: setattr(m, "a", nn.LSTM(5, 5)), "LSTM is not a linear layer"),
        (
            lambda m: (m.half().a.bias.data.fill_(6e4), m.a.weight.data.mul_(1e-2)),
            "not finite in the layers' dtype",
        ),
    ],
)
def test_refused_for_what_the_modules_are(change: Callable[[Any], Any], reason: str) -> None:
    model = convs(lambda m, x: m.b(m.act(m.a(x))))
    change(model)
    (found,) = unit_norms(model, ["a"])
    assert not found.applied
    assert reason in found.why


def test_a_forward_replaced_on_a_layer() -> None:
    model = convs(lambda m, x: m.b(m.act(m.a(x))))
    captured = capture(model)
    model.a.forward = model.b.forward
    assert fixed(captured, model.a) == "the forward of `a` was replaced on the instance"
    assert fixed(captured, model.b) is None
    first, second = swap_layers(model, "gmp", ["a", "b"])
    assert (first.applied, first.why) == (False, "its forward was replaced on the instance")
    assert second.applied


class Applied(nn.Module):
    """A block of functions alone: no name of a layer tells of it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@pytest.mark.parametrize(
    ("watched", "passes"), [("0", False), ("1", False), ("2", False), ("3", True), ("", True)]
)
def test_hooks_of_a_block_that_sees_what_would_change(watched: str, passes: bool) -> None:
    model = sequential(
        nn.Sequential(nn.Linear(3, 4)),
        Applied(),
        nn.Sequential(nn.Linear(4, 4)),
        nn.Sequential(nn.Softmax(-1)),
    )
    model.get_submodule(watched).register_forward_hook(hooked)
    (found,) = unit_norms(model, ["0.0"])
    assert found.why == (
        "scale pushed into `2.0`" if passes else f"hooks of `{watched}` take values that would change"
    )


def test_parametrized_consumers_and_wrong_names() -> None:
    model = _change(lambda m: parametrizations.weight_norm(m.b))
    assert not unit_norms(model, ["a"])[0].applied
    with pytest.raises(ReparamError, match=r"^Net has no layer `c`$"):
        unit_norms(model, ["a", "c"])
    with pytest.raises(NonFiniteError):
        unit_norms(_change(lambda m: m.a.weight.data[0].fill_(float("nan"))), ["a"])


def test_residual_networks_are_left_with_reasons() -> None:
    found = unit_norms(randomized(CifarResNet(1, 4)), ["conv1", "layer2.0.conv1", "linear"])
    assert [o.applied for o in found] == [False] * 3
    assert all("fold batch norm first" in o.why for o in found[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("power", [-40, -30, -12, -8, -4, 0, 20, 37])
def test_rows_of_any_size(power: int, dtype: torch.dtype) -> None:
    """Squares of these do not fit float32, the weights do: w = v/(‖v‖ + ε) by the decimal module's 50 digits."""
    largest = {torch.float64: 290}.get(dtype, 37)  # as near to the ends of its own range
    linear = nn.Linear(4, 3, bias=False).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(noise(3, 4) * float(f"1e{power * largest // 37}"))
    rows = [[Decimal(v) for v in row] for row in linear.weight.double().tolist()]
    with localcontext() as context:
        context.prec = 50
        lengths = [sum(v * v for v in row).sqrt() + Decimal("1e-8") for row in rows]
        expected = torch.tensor(
            [[float(v / n) for v in row] for row, n in zip(rows, lengths, strict=True)], dtype=torch.float64
        )
    layer = LAYERS["unit", nn.Linear].from_plain(linear)
    bar = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 2**-8}[dtype]
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # what the dtype itself can hold
    for found in (layer.composed(), layer.fold().weight):
        torch.testing.assert_close(found.double(), expected, rtol=bar, atol=least)
    with torch.no_grad():
        scale = layer.form.pushed_scale(layer.weight_v, layer.record().spec)
    torch.testing.assert_close(
        scale, torch.tensor([float(n) for n in lengths], dtype=torch.float64), rtol=1e-15, atol=0
    )
    (gradient,) = torch.autograd.grad(layer.composed().double().square().sum(), layer.weight_v)
    assert gradient.isfinite().all()


def test_the_gradient_of_the_direction() -> None:
    """Through v/(‖v‖ + ε), by finite differences."""
    layer = LAYERS["unit", nn.Linear].from_plain(randomized(nn.Linear(4, 3, bias=False)))
    spec = layer.record().spec
    for size in (1e-8, 1.0, 1e20):

        def composed(v: Tensor, size: float = size) -> Tensor:
            return layer.form.weight({"weight_v": v * size}, spec, torch.float64, False)

        assert torch.autograd.gradcheck(composed, layer.weight_v.detach().requires_grad_())


def test_frozen_layers_stay_frozen_and_are_named() -> None:
    plain = convs(lambda m, x: m.b(m.act(m.a(x))))
    plain.requires_grad_(False)
    model = copied(plain)
    (found,) = unit_norms(model, ["a"])
    assert found.why == "scale pushed into `b` (frozen)"
    assert not any(p.requires_grad for p in model.parameters())
    assert difference(model, plain, noise(2, 2, 6, 5)) <= EXACT


def test_zero_rows_hooks_channels_last_and_names() -> None:
    plain = convs(lambda m, x: m.kept[0](m.act(m.a(x)))).to(memory_format=torch.channels_last)
    plain.kept = (plain.b,)
    plain.alias = plain.a
    plain.a.weight.data[1] = 0
    plain.a.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    model = copied(plain)
    (found,) = unit_norms(model, ["a", "alias"])
    assert found.applied
    assert model.alias is model.a
    assert model.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.a.weight[1].any()
    assert difference(model, plain, noise(2, 2, 6, 5)) <= EXACT
