"""A model whose forward pass was rewritten: everything else of it stays, and it is copied, pickled, compiled, exported."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from graph_cases import EXACT, difference, noise, randomized
from scale_oracle import (
    Twice,
    a_net,
    placed,
    to_gmp,
)
from support import ROOT, python
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparam.graph.capture import capture
from reparam.graph.rewritten import Rewritten
from reparam.layers.geometric import scale_units


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
