"""Every network of examples/models: size, shapes, capture by torch.fx, gradients, and what its README says."""

from __future__ import annotations

import re

import pytest
import torch
from example_cases import DEFAULTS, MODELS, OPTIONS, Case, cached, count, outputs
from support import ROOT

from reparam.graph import load_architecture

README = (MODELS / "README.md").read_text(encoding="utf-8")
every_default = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.id)
every_case = pytest.mark.parametrize("case", DEFAULTS + OPTIONS, ids=lambda case: case.id)


@every_case
def test_parameters_and_shapes(case: Case) -> None:
    model = cached(case)
    assert count(model) == case.parameters
    for batch in (1, 3):
        out = outputs(model, case.sample(batch))
        assert [tuple(tensor.shape) for tensor in out] == [(batch, *shape) for shape in case.outputs]
        assert all(bool(tensor.isfinite().all()) for tensor in out)


@every_case
def test_torch_fx_captures_the_network(case: Case) -> None:
    model = cached(case)
    traced = torch.fx.symbolic_trace(model)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in model.named_parameters()}
    # Two batch sizes: neither may be baked in.
    for batch in (1, 2):
        inputs = case.sample(batch)
        for found, expected in zip(outputs(traced, inputs), outputs(model, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_default
def test_the_same_seed_and_inputs_give_the_same_outputs(case: Case) -> None:
    torch.manual_seed(0)
    again = case.build()
    inputs = case.sample(2)
    first = outputs(cached(case), inputs)
    torch.manual_seed(123)
    for model in (cached(case), again):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(model, inputs), strict=True))


@every_default
def test_gradients_reach_every_parameter(case: Case) -> None:
    small = {"resnet18": (3, 32, 32), "resnet34": (3, 32, 32)}.get(case.ref.partition(":")[2])
    torch.manual_seed(0)
    model = case.build()
    inputs = [torch.rand(2, *small)] if small else case.sample(2)
    out = model(*inputs)
    sum(tensor.square().sum() for tensor in (out if isinstance(out, tuple) else (out,))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_the_table_holds_every_network_with_its_measured_size() -> None:
    rows = re.findall(
        r"^\| \[(.+?)\]\((.+?)\) \| (.+?) \| ([\d,]+) \| (.+?) \| (.+?) \|$", README, re.MULTILINE
    )
    assert [(ref, size, spec) for ref, _, _, size, spec, _ in rows] == [
        (case.ref, f"{count(cached(case)):,}", "; ".join(",".join(["N", *map(str, s)]) for s in case.inputs))
        for case in DEFAULTS
    ]
    assert all(ref.startswith(f"{link}:") for ref, link, *_ in rows)
    listed = {link for _, link, *_ in rows}
    assert listed == {path.name for path in MODELS.glob("*.py")} - {"__init__.py"}


def test_the_command_lines_of_the_readme_build() -> None:
    lines = re.findall(r"^    --arch (.+)$", README, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        ref, *args = line.split(" --arch-arg ")
        load_architecture(str(ROOT / ref), dict(arg.split("=", 1) for arg in args))


def test_a_stated_size_in_a_docstring_is_the_measured_one() -> None:
    """In every file, with the thousands separated."""
    for case in DEFAULTS:
        text = (MODELS / case.ref.partition(":")[0]).read_text(encoding="utf-8")
        assert f"{case.parameters:,}" in text, case.ref
