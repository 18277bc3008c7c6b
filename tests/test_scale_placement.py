"""The scale of GmP after the activation: where it may stand, that nothing changes, and that the model stays ordinary."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import MODELS, applied, moved, oracle, sequential, tensors, to_gmp, why
from support import ROOT, python
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from reparam.graph import load_architecture
from reparam.graph.capture import capture
from reparam.graph.rewritten import Rewritten
from reparam.graph.rules.scale import place_scales
from reparam.layers.geometric import scale_units

SAME_LOSS = 1e-10


@dataclass(frozen=True)
class Case:
    """A network of modules, and behind which one every scale has to stand; the others stay inside."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    places: dict[str, str] = field(default_factory=dict)


class Shared(nn.Module):
    """One ReLU at two places, in place, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.mark1, self.mark2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mark1(self.relu(self.conv1(x)))
        z = self.mark2(self.relu(self.conv2(y)))
        return self.relu(self.conv3(z) + y)


def resnet() -> nn.Module:
    args = {"blocks": "(1, 1, 1, 1)", "classes": "5", "stem": "imagenet", "batch_norm": "False"}
    return randomized(load_architecture(f"{MODELS / 'resnet.py'}:ResNet", args))


def vae() -> nn.Module:
    args = {"channels": "1", "size": "8", "width": "4", "latent": "3"}
    return randomized(load_architecture(f"{MODELS / 'conv_vae.py'}:ConvVAE", args))


CASES = {
    "conv relu pool conv": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(), pool=nn.MaxPool2d(2), conv2=nn.Conv2d(4, 3, 2)
        ),
        ((2, 2, 8, 8),),
        {"conv1": "pool"},
    ),
    "unbatched": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(), conv2=nn.Conv2d(4, 3, 2), relu2=nn.ReLU()
        ),
        ((2, 8, 8),),
        {"conv1": "relu1", "conv2": "relu2"},
    ),
    "in place, a pool not right behind": Case(
        lambda: sequential(
            conv1=nn.Conv2d(2, 4, 3), relu1=nn.ReLU(inplace=True), avg=nn.AvgPool2d(2), pool=nn.MaxPool2d(2)
        ),
        ((2, 2, 9, 9),),
        {"conv1": "relu1"},
    ),
    "leaky, prelu, dropout and identity before and behind": Case(
        lambda: sequential(
            conv1=nn.Conv1d(2, 4, 3),
            drop1=nn.Dropout(),
            id=nn.Identity(),
            act1=nn.PReLU(4),
            drop2=nn.Dropout(),
            conv2=nn.Conv1d(4, 4, 3),
            act2=nn.LeakyReLU(0.3, inplace=True),
            pool=nn.AdaptiveMaxPool1d(2),
            conv3=nn.Conv1d(4, 2, 1),
        ),
        ((3, 2, 12),),
        {"conv1": "act1", "conv2": "pool"},
    ),
    "three axes": Case(
        lambda: sequential(conv1=nn.Conv3d(2, 4, 2, groups=2), act=nn.ReLU(), pool=nn.MaxPool3d(2)),
        ((2, 2, 5, 5, 5),),
        {"conv1": "pool"},
    ),
    "transposed and grouped": Case(
        lambda: sequential(
            conv1=nn.ConvTranspose2d(4, 6, 3, groups=2), act1=nn.ReLU(), conv2=nn.Conv2d(6, 6, 2, groups=3)
        ),
        ((2, 4, 3, 3),),
        {"conv1": "act1"},
    ),
    "linear on the last axis": Case(
        lambda: sequential(fc1=nn.Linear(3, 4), act1=nn.ReLU(), fc2=Conv1D(5, 4), act2=nn.LeakyReLU(-0.5)),
        ((2, 4, 3),),
        {"fc1": "act1", "fc2": "act2"},
    ),
    "a pool over the units of a linear layer": Case(
        lambda: sequential(
            fc1=nn.Linear(3, 6), act=nn.ReLU(), pool=nn.MaxPool1d(3, 1, 1), fc2=nn.Linear(6, 2)
        ),
        ((2, 3),),
        {"fc1": "act"},
    ),
    "a pool over the units of a convolution": Case(
        lambda: sequential(conv1=nn.Conv1d(2, 4, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2), fc=nn.Linear(3, 2)),
        ((2, 2, 8),),
        {"conv1": "act"},
    ),
    "a shared activation": Case(
        lambda: randomized(Shared()), ((2, 2, 5, 5),), {"conv1": "mark1", "conv2": "mark2"}
    ),
    "ResNet": Case(
        resnet,
        ((2, 3, 33, 33),),
        {"conv1": "maxpool", **{f"layer{i}.0.conv1": f">layer{i}.0.conv2" for i in range(1, 5)}},
    ),
    "VAE": Case(
        vae,
        ((2, 1, 8, 8), (2, 3)),
        {"conv1": "relu1", "conv2": "relu2", "expand": "relu3", "deconv1": "relu4"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_placing_changes_nothing_and_r_may_change_sign_there(name: str) -> None:
    case = CASES[name]
    plain, x = case.build(), [noise(*shape) for shape in case.shapes]
    inside = to_gmp(plain)
    before = tensors(inside)
    model, outcomes = place_scales(copy.deepcopy(inside))
    assert isinstance(model, Rewritten)
    assert applied(outcomes) == set(case.places)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert difference(model, plain, *x) <= EXACT
    assert difference(moved(model), oracle(plain, model, case.places), *x) <= EXACT
    inside.load_state_dict(model.state_dict())
    assert difference(model, inside, *x) > 1e-3, "r < 0 makes no difference here"


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8))
        self.slope = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        c = self.convs
        x = F.relu(c[0](x))
        x = torch.relu(c[1](x))
        x = c[2](x).relu()
        x = c[3](x)
        y = F.relu_(x)
        x = F.max_pool2d(y, 3, 1, 1).reshape(y.size(0), 3, x.shape[2], x.size(3))
        x = torch.max_pool2d(F.leaky_relu(c[4](x), 0.2, inplace=True), 2, 1)
        x = F.prelu(c[5](x), self.slope)
        x = F.adaptive_max_pool2d(F.dropout(c[6](x), training=False).relu_(), 3)
        x, _ = F.max_pool2d(F.relu(input=c[7](x)), 2, return_indices=True)
        return x

    def scaled(self, x: Tensor, r: list[Tensor]) -> Tensor:
        """The same with the scales where they belong."""
        c, r = self.convs, [s.reshape(-1, 1, 1) for s in r]
        x = r[0] * c[0](x).clamp(min=0)
        x = r[1] * c[1](x).clamp(min=0)
        x = r[2] * c[2](x).clamp(min=0)
        x = r[3] * F.max_pool2d(c[3](x).clamp(min=0), 3, 1, 1)
        y = c[4](x)
        x = r[4] * F.max_pool2d(torch.where(y > 0, y, 0.2 * y), 2, 1)
        y = c[5](x)
        x = r[5] * torch.where(y > 0, y, self.slope.reshape(-1, 1, 1) * y)
        x = r[6] * F.adaptive_max_pool2d(c[6](x).clamp(min=0), 3)
        return F.max_pool2d(r[7] * c[7](x).clamp(min=0), 2)


def test_functions_and_methods() -> None:
    plain, x = randomized(Functional()), noise(2, 3, 7, 7)
    model, outcomes = place_scales(to_gmp(plain))
    assert len(applied(outcomes)) == 8
    assert difference(model, plain, x) <= EXACT
    moved(model)
    units = oracle(plain, model, {f"convs.{i}": "" for i in range(8)})
    units._forward_hooks.clear()
    with torch.no_grad():
        expected = units.scaled(x, [conv.r for conv in model.convs])
        assert float((model(x) - expected).abs().max() / expected.abs().max()) <= EXACT


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(self.relu(self.fc(x))))


class Branch(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.relu(y) + y


class Statement(Twice):
    """In place, as a statement: the activation's result is read under the name of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        F.relu_(y)
        return y + 1


class Residual(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x) + x)


class Reading(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x)) + self.fc.weight.sum()


class ReadingR(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.fc(x))
        return y + self.fc.r.sum() if hasattr(self.fc, "r") else y


class Slope(Twice):
    """The layer's output is the slope, not what is activated."""

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.fc(x)[0])


class BothArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return F.prelu(y, y)


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x)) if x.sum() > 0 else x


class WithoutGrad(Twice):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.fc(x)
        return self.relu(y)


class TrainsItsOwnWay(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))

    def train(self, mode: bool = True) -> TrainsItsOwnWay:
        super().train(mode)
        self.fc.train(False)
        return self


def one(activation: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(OrderedDict(fc=nn.Linear(3, 3), act=activation))


REFUSED = {
    "gelu": (one(nn.GELU()), "GELU follows it, which is no positively homogeneous activation"),
    "relu6": (one(nn.ReLU6()), "ReLU6 follows it"),
    "silu": (one(nn.SiLU()), "SiLU follows it"),
    "norm": (one(nn.LayerNorm(3)), "LayerNorm follows it"),
    "alpha dropout": (one(nn.AlphaDropout()), "AlphaDropout follows it"),
    "nothing": (one(nn.Identity()), "no activation follows it"),
    "twice": (Twice, "called 2 times"),
    "branch": (Branch, "its output goes to `relu` and `add`"),
    "statement": (Statement, "its output goes to `relu_` and `add`"),
    "residual": (Residual, "add follows it"),
    "weight read": (Reading, "a tensor that is no input, parameter or buffer"),
    "scale read": (ReadingR, "read outside of its call"),
    "slope": (Slope, "getitem follows it"),
    "slope and input": (BothArguments, "prelu follows it"),
    "untraceable": (Branching, "torch.fx cannot trace Branching"),
    "no_grad": (WithoutGrad, "switches gradients off"),
    "train": (TrainsItsOwnWay, "TrainsItsOwnWay overrides `train` of nn.Module"),
    "in a leaf": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4)), "does not show its call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot_stand_it_stays_inside(name: str) -> None:
    build, reason = REFUSED[name]
    model = to_gmp(randomized(build()))
    same, outcomes = place_scales(model)
    assert same is model
    assert applied(outcomes) == set()
    assert all(not layer.scale_outside for layer in model.modules() if hasattr(layer, "scale_outside"))
    assert all(reason in outcome.why for outcome in outcomes), outcomes
    assert all("\n" not in outcome.why for outcome in outcomes)
    assert outcomes


def a_net() -> nn.Sequential:
    return sequential(
        conv1=nn.Conv2d(2, 4, 3),
        relu1=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(4, 3, 2),
        act=nn.ReLU(),
    )


def placed(model: nn.Module) -> Rewritten:
    result, _ = place_scales(model)
    assert isinstance(result, Rewritten)
    return result


def test_a_pool_that_returns_more_or_is_watched() -> None:
    for pool in (nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2)):
        plain, x = sequential(conv=nn.Conv2d(2, 4, 3), relu=nn.ReLU(), pool=pool), noise(2, 2, 8, 8)
        seen: list[Tensor] = [torch.zeros(1)] * 2
        if not pool.return_indices:
            seen.clear()
            pool.register_forward_hook(lambda m, args, out, to=seen: to.append(args[0]))
        model, outcomes = place_scales(to_gmp(plain))
        assert why(outcomes, "conv") == "after `relu`"
        assert difference(model, plain, x) <= EXACT
        assert torch.allclose(seen[0], seen[1], rtol=EXACT, atol=EXACT)


def test_values_that_forbid_it() -> None:
    negative, mean, kept = to_gmp(a_net()), to_gmp(a_net()), a_net()
    with torch.no_grad():
        negative.conv1.r[1] = -1.0
        negative.conv2.r[1] = 0.0
        kept.conv1.weight[0] = 0.0
    mean.conv1.normalize_mean()
    for model, reason in (
        (negative, "1 of its r are negative"),
        (mean, "place the scale before normalizing the mean"),
        (to_gmp(kept), "without usable lambda"),
    ):
        x, before = noise(2, 2, 8, 8), copy.deepcopy(model)
        model, outcomes = place_scales(model)
        assert reason in why(outcomes, "conv1")
        assert applied(outcomes) == {"conv2"}
        assert difference(model, before, x) <= EXACT
    again, outcomes = place_scales(model)
    assert again is model
    assert "stands after the activation already" in why(outcomes, "conv2")


def test_hooks() -> None:
    calls: list[str] = []
    reached = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)))
    for hooked, reason in (
        ("0", "the hooks of `0` would not run any more"),
        ("0.0", "hooks of the layer see its output"),
        ("0.1", "hooks of `0.1` see values"),
    ):
        model = to_gmp(reached)
        model.get_submodule(hooked).register_forward_hook(lambda m, args, out: calls.append("hook"))
        assert reason in why(place_scales(model)[1], "0.0")
    model = to_gmp(reached.double())
    model[0][2].register_forward_hook(lambda m, args, out: calls.append("pool"))
    model.register_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    x, calls[:] = noise(1, 2, 8, 8), []
    model, outcomes = place_scales(model)
    assert why(outcomes, "0.0") == "after `0.1`"
    model(x)
    assert calls == ["pool", "RewrittenSequential"]


def test_a_forward_pass_replaced_by_an_attribute() -> None:
    model = to_gmp(a_net())
    model.forward = lambda x: x
    assert "replaced by an attribute" in why(place_scales(model)[1], "conv1")


def test_a_rewritten_part_of_another_model() -> None:
    outer = nn.Sequential(placed(to_gmp(a_net())), to_gmp(nn.Conv2d(3, 3, 1).double()), nn.ReLU())
    assert "`0` is rewritten already" in why(place_scales(outer)[1], "1")


class Kept(nn.Module):
    """What a graph would forget."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.unused = nn.Linear(3, 3), nn.ReLU(), nn.Linear(2, 2)
        self.register_buffer("lasting", torch.ones(3))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.config = {"width": 3}

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.relu(self.fc(x)) * self.lasting + self.passing + shift

    def encode(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_everything_else_of_the_model_stays() -> None:
    plain = randomized(Kept())
    inside = to_gmp(plain)
    keys = list(inside.state_dict())
    model = placed(inside)
    assert type(model).__name__ == "RewrittenKept"
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == ["lasting", "passing"]
    assert model.config == {"width": 3}
    assert list(inspect.signature(model.forward).parameters) == ["x", "shift"]
    assert "forward of Kept with 1 scale " in repr(model)
    x = noise(2, 3)
    with torch.no_grad():
        expected = plain(x, shift=2.0)
        assert float((model(x, shift=2.0) - expected).abs().max() / expected.abs().max()) <= EXACT
    with pytest.raises(
        AttributeError, match=r"Kept\.encode: only the forward pass was rewritten.*scales inside"
    ):
        model.encode(x)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing
    with torch.no_grad():
        model.fc.r.fill_(1.0)
    restored = model.restore()
    assert type(restored) is Kept
    assert list(restored.state_dict()) == keys
    assert restored.fc is model.fc
    assert difference(restored, model, x) <= EXACT


def test_annotations_are_no_business_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Kept.forward.__annotations__, "x", type("Local", (), {}))
    model = placed(to_gmp(randomized(Kept())))
    assert difference(pickle.loads(pickle.dumps(model)), model, noise(2, 3)) == 0.0


def test_copies_are_apart() -> None:
    model, x = placed(to_gmp(a_net())), noise(2, 2, 8, 8)
    twin = copy.deepcopy(model)
    before = model(x)
    with torch.no_grad():
        assert torch.equal(twin(x), before)
        twin.conv1.r *= -1
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)


@fx.wrap
def wrapped(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x * 3


class Wrapping(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return wrapped(F.max_pool1d(self.relu(self.fc(x)), 2))


def test_pickles_in_another_process(tmp_path: Path) -> None:
    for plain, x in ((a_net(), noise(2, 2, 8, 8)), (randomized(Wrapping()), noise(2, 3))):
        model = placed(to_gmp(plain))
        (tmp_path / "model").write_bytes(pickle.dumps((model, x)))
        code = (
            "import sys, pickle, torch; model, x = pickle.load(open(sys.argv[1], 'rb')); "
            "found = model(x).detach(), list(model.state_dict()), type(model).__name__; "
            "pickle.dump(found, open(sys.argv[2], 'wb'))"
        )
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        ran = python(code, tmp_path / "model", tmp_path / "found", env={**os.environ, "PYTHONPATH": path})
        assert ran.returncode == 0, ran.stderr
        found, keys, name = pickle.loads((tmp_path / "found").read_bytes())
        with torch.no_grad():
            assert torch.equal(found, model(x))
        assert keys == list(model.state_dict())
        assert name == type(model).__name__


def test_it_is_captured_again_with_its_scales() -> None:
    model = placed(to_gmp(a_net()))
    again = capture(model)
    found = [node for node in again.nodes() if node.target is scale_units]
    assert [str(node.args[1].target) for node in found] == ["conv1.r", "conv2.r"]
    assert [node.args[2] for node in found] == [-3, -3]
    assert difference(Rewritten.of(copy.deepcopy(model), again.graph), model, noise(2, 2, 8, 8)) == 0.0


def test_compiled_and_exported() -> None:
    model, x = placed(to_gmp(a_net())), noise(2, 2, 8, 8)
    expected = model(x)
    expected.sum().backward()
    gradient = model.conv1.r.grad.clone()
    model.zero_grad()
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    found.sum().backward()
    expected = expected.detach()
    bar = EXACT * float(expected.abs().max())
    assert float((found.detach() - expected).abs().max()) <= bar
    assert float((model.conv1.r.grad - gradient).abs().max() / gradient.abs().max()) <= EXACT
    torch.compiler.reset()
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict).module()
        assert float((exported(x).detach() - expected).abs().max()) <= bar


def test_a_traceback_shows_the_generated_line() -> None:
    model = placed(to_gmp(a_net()))
    with pytest.raises(RuntimeError) as caught:
        model(noise(2, 5, 8, 8))
    assert "conv1 = self.conv1(input_1)" in "".join(traceback.format_exception(caught.value))


def test_inside_and_outside_train_the_same_while_r_is_positive() -> None:
    inside = to_gmp(a_net())
    outside = placed(copy.deepcopy(inside))
    x = noise(8, 2, 8, 8)
    target = noise(8, 3, 2, 2, seed=4)
    losses: list[list[float]] = []
    for model in (inside, outside):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses.append([])
        for _ in range(6):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert all(bool((conv.r > 0).all()) for conv in (model.conv1, model.conv2))
    assert losses[0][-1] < losses[0][0] * 0.9
    assert max(abs(a - b) / a for a, b in zip(*losses, strict=True)) <= SAME_LOSS


def test_narrow_activations_stay_narrow() -> None:
    model = placed(to_gmp(a_net())).bfloat16()
    assert model.conv1.r.dtype == torch.float64
    x = noise(2, 2, 8, 8)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    wide = placed(to_gmp(a_net())).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.float()).dtype == torch.bfloat16
