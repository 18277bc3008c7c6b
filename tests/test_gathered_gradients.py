"""``gathered_gradients``: one composition for all parts of a step, and the gradients that each part alone would have given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from operator_calls import Maps
from support import gaussian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reparam.errors import ReparamError
from reparam.graph import convert
from reparam.layers import Reparameterized, gathered_gradients, layer_class
from reparam.training.distributed import World
from reparam.training.objective import Objective
from reparam.training.precision import Precision
from reparam.training.stepping import Stepper

X = gaussian(12, 3, 6, 6).double()
PARTS = 3
#: sums of the same float64 numbers in another order
SAME = 1e-13


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2)
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lstm(x.flatten(1, 2))[0]
        result: Tensor = self.attention(hidden, hidden, hidden)[0]
        return result


def layered(kind: str = "gmp") -> nn.Sequential:
    """Each layer in its form, the last too, and in its place."""
    return nn.Sequential(
        *(
            layer_class(kind, type(module)).from_plain(module) if list(module.parameters()) else module
            for module in plain()
        )
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gmp": lambda: convert(plain(), "gmp"),
    "gmp, scale inside": lambda: convert(plain(), "gmp", scale="inside"),
    "gmp, mean normalized": lambda: convert(plain(), "gmp", mean_norm=True),
    "wn": lambda: convert(plain(), "wn"),
    "unit": lambda: convert(plain(), "unit"),
    "recurrent": lambda: convert(Recurrent(), "gmp"),
}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    made = NETWORKS[request.param]().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def run_parts(model: nn.Module, x: Tensor = X, parts: int = PARTS) -> None:
    for part in x.chunk(parts):
        model(part).square().sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = SAME) -> None:
    a, b = gradients(found), gradients(expected)
    assert a.keys() == b.keys()
    assert b
    largest = max(float(grad.norm()) for grad in b.values())
    for name, grad in b.items():
        assert (a[name].dtype, a[name].shape) == (grad.dtype, grad.shape)
        assert float((a[name] - grad).norm()) <= tolerance * largest, name


def test_gradients_are_those_of_composing_every_time(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    run_parts(other)
    with gathered_gradients(model):
        run_parts(model)
        assert not any(name.endswith(("theta", "weight_v")) for name in gradients(model))
    assert_same(model, other)
    # And once more, on top of what is there.
    run_parts(other)
    with gathered_gradients(model):
        run_parts(model)
    assert_same(model, other)
    assert all(getattr(module, "weight_cache", None) is None for module in model.modules())


def test_the_map_runs_once_each_way() -> None:
    for model in (layered(), NETWORKS["recurrent"]()):  # each has three
        with Maps() as maps, gathered_gradients(model.double()):
            run_parts(model)
        assert maps.ran == {"rows": 3, "rows_gradient": 3}


def test_sums_under_autocast_keep_the_parameters_precision() -> None:
    """bfloat16 cannot count beyond 256: 1 + 1 + ... stands still there."""
    parts = 400
    layer = layer_class("gmp", nn.Linear).from_plain(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        layer.theta.fill_(torch.pi / 2)
        layer.r.fill_(1.0)
    with gathered_gradients(layer), torch.autocast("cpu", dtype=torch.bfloat16):
        for part in torch.ones(parts, 1).chunk(parts):
            assert layer.weight.dtype == torch.bfloat16
            layer(part).sum().backward()
    assert layer.r.grad.item() == parts


def test_under_autocast_weights_are_the_same_bits() -> None:
    model = layered()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            expected = model[3].weight
            with gathered_gradients(model):
                found = model[3].weight
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_narrow_models_are_summed_in_the_dtype_of_their_angles() -> None:
    model, other = (layered().bfloat16() for _ in range(2))
    x = X.bfloat16()
    run_parts(other, x)
    with gathered_gradients(model):
        run_parts(model, x)
    assert model[3].theta.grad.dtype == torch.float32
    assert_same(model, other, 1e-6)


def test_a_block_that_fails_drops_what_it_gathered() -> None:
    model = layered().double()

    def fail() -> None:
        with gathered_gradients(model):
            run_parts(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model[3].theta.grad is None
    assert all(getattr(module, "weight_cache", None) is None for module in model.modules())


def test_what_changed_inside_is_composed_again(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    for trained, gathered in ((model, gathered_gradients(model)), (other, nullcontext())):
        with gathered:
            with torch.no_grad():
                trained(X)
            for layer in trained.modules():
                if isinstance(layer, Reparameterized):
                    assert layer.composed(next(iter(layer.held))).requires_grad
                    with torch.no_grad():
                        for parameter in layer.parameters():
                            parameter.mul_(1.1)
            run_parts(trained)
    assert_same(model, other)


@pytest.mark.parametrize("kind", ["gmp", "wn"])
def test_parameters_that_change_after_a_backward_pass_are_refused(kind: str) -> None:
    """Their gradient would be of other weights than the ones the map is differentiated at."""

    def run(model: nn.Sequential, change: Callable[[Tensor], Tensor]) -> None:
        with gathered_gradients(model):
            model(X).sum().backward()
            with torch.no_grad():
                change(next(model[3].parameters()))

    for change in (lambda p: p.mul_(1.1), lambda p: p.requires_grad_(False)):
        model = layered(kind).double()
        with pytest.raises(ReparamError, match="parameters changed"):
            run(model, change)
        assert all(getattr(module, "weight_cache", None) is None for module in model.modules())


def test_layers_freed_after_a_pass() -> None:
    """Frozen for a pass and trained in the next: each pass is composed for what it trains."""
    model, other = (layered().double() for _ in range(2))
    for trained, gathered in ((model, gathered_gradients(model)), (other, nullcontext())):
        with gathered:
            for frees, part in zip((False, True, True), X.chunk(PARTS), strict=True):
                trained[3].requires_grad_(frees)
                trained(part).square().sum().backward()
    assert_same(model, other)


def test_a_backward_pass_after_the_block_is_refused() -> None:
    model = layered().double()
    with gathered_gradients(model):
        late = model(X).sum()
        twin = copy.copy(model[3])
    with pytest.raises(ReparamError, match="after the block"):
        late.backward()
    # What a copy kept of the block is closed.
    twin(gaussian(2, 64).double()).sum().backward()
    assert twin.theta.grad is not None


def test_frozen_and_unused_layers() -> None:
    model, other = (layered().double() for _ in range(2))
    for trained, gathered in ((model, gathered_gradients(model)), (other, nullcontext())):
        trained[0].requires_grad_(False)
        with gathered:
            for part in X.chunk(PARTS):
                trained[:4](part).square().sum().backward()
    assert_same(model, other)
    assert model[0].theta.grad is None
    assert model[5].theta.grad is None
    with gathered_gradients(model.requires_grad_(False)):
        model(X)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, other = (layered().double() for _ in range(2))
    x = X.clone().requires_grad_()
    for trained, gathered in ((model, gathered_gradients(model)), (other, nullcontext())):
        with gathered:
            for part in x.chunk(PARTS):
                hidden = checkpoint(trained[:4], part, use_reentrant=reentrant)
                trained[4:](hidden).square().sum().backward()
    assert_same(model, other)


def test_compiled_code_composes_as_ever() -> None:
    model, other = (layered("wn").double() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with gathered_gradients(model):
        for part in X.chunk(PARTS):
            compiled(part).square().sum().backward()
        assert gradients(model).keys() == dict(model.named_parameters()).keys()
    run_parts(other)
    assert_same(model, other, 1e-11)


@pytest.mark.parametrize(("parts", "size"), [(3, 1), (1, 1), (3, 2)])
def test_a_training_step_in_parts_composes_once(
    parts: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank; several wait for every gradient within each backward pass."""
    model = layered().double()
    monkeypatch.setattr(Stepper, "_exchange", lambda self, last: nullcontext())
    device = torch.device("cpu")
    stepper = Stepper(
        model,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        Objective("classify", "ce", "accuracy", 2),
        Precision(device, torch.float64, None),
        World(0, size, device),
        samples=12,
        parts=parts,
    )
    with Maps() as maps:
        stepper.backward(X, torch.arange(12) % 2)
    assert maps.ran["rows"] == maps.ran["rows_gradient"] == 3 * (parts if size > 1 else 1)
    assert model[3].theta.grad is not None
