"""The network that is trained: which parameters move, how it may answer, that it may be compiled and stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_calls import Maps
from support import assert_same_bits
from torch import Tensor, nn
from training_cases import geometric, labelled, plain, recipe, trained, values

from reparam.errors import ReparamError
from reparam.layers import Reparameterized
from reparam.training.evaluation import evaluate


def test_frozen_parameters_stay_and_train_only_some_kinds(tmp_path: Path) -> None:
    data = labelled()
    model = geometric()
    model.get_parameter("0.theta").requires_grad_(False)
    before = values(model)
    trained(model, data, recipe(epochs=1), tmp_path / "frozen")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.r", "0.lambda_", "3.weight", "3.bias"}
    model = geometric()
    before = values(model)
    trained(model, data, recipe(epochs=1, train="r,bias"), tmp_path / "some")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.r", "3.bias"}
    assert all(p.requires_grad for p in model.parameters()), "as the caller had them"
    with pytest.raises(ReparamError, match=r"--train g: the model has no such parameters"):
        trained(geometric(), data, recipe(train="g"), tmp_path / "none")


def test_layers_of_the_model_are_as_they_were(tmp_path: Path) -> None:
    model = geometric()
    trained(model, labelled(), recipe(epochs=1), tmp_path / "run")
    assert [type(m).__name__ for m in model.modules() if isinstance(m, Reparameterized)] == ["GmPLinear"]
    assert not any(module.training for module in model.modules())


def test_a_network_that_answers_in_a_structure(tmp_path: Path) -> None:
    class Answers(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.net, self.form = plain(), form

        def forward(self, x: Tensor) -> Any:
            logits = self.net(x)
            return {"dict": {"loss": None, "logits": logits}, "tuple": (logits, x), "tensor": logits}[
                self.form
            ]

    found = {}
    for form in ("dict", "tuple", "tensor"):
        model = Answers(form)
        trained(model, labelled(), recipe(epochs=1), tmp_path / form)
        found[form] = values(model)
    assert_same_bits(found["dict"], found["tensor"])
    assert_same_bits(found["tuple"], found["tensor"])


def test_an_evaluation_composes_every_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(*arguments: Any) -> Any:
        with Maps() as maps:
            result = evaluate(*arguments)
        counts.append(maps.ran["rows"])
        return result

    monkeypatch.setattr("reparam.training.loop.evaluate", counted)
    model = geometric()
    trained(model, labelled(validation=9), recipe(epochs=2), tmp_path)  # three batches of four
    assert counts == [sum(isinstance(m, Reparameterized) for m in model.modules())] * 3


def test_compiled_gives_what_uncompiled_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(module: nn.Module) -> Callable[..., Any]:
        compiled.append(module)
        return lambda *inputs: module(*inputs)

    models = [geometric(), geometric()]
    trained(models[0], labelled(), recipe(epochs=1), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", compile_)
    trained(models[1], labelled(), recipe(epochs=1, compile=True), tmp_path / "compiled")
    assert compiled == [models[1], models[1]]
    assert_same_bits(*map(values, models))


def test_what_cannot_be_compiled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise BackendCompilerFailed(self.forward, RuntimeError("no C++ compiler\nand more"), None)
            return x

    monkeypatch.setattr(torch, "compile", lambda module: module)
    with pytest.raises(
        ReparamError, match=r"^--compile: torch cannot compile the network \(.*\): leave it out$"
    ):
        trained(nn.Sequential(plain(), Fails()), labelled(), recipe(compile=True), tmp_path / "run")
