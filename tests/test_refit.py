"""Refit against an export of the same weights, what stays as it was, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_cases import NETWORKS, Exports, blanked, random_model, values_of, without_metadata
from support import bits, snapshot
from torch import Tensor

from reparam.checkpoint import convert_checkpoint, load_state_dict
from reparam.errors import ArchitectureError, CheckpointError, NonFiniteError
from reparam.export import export_onnx_model
from reparam.onnxfile.metadata import SOURCE, UNUSED, VERIFICATION, annotate, properties, set_properties
from reparam.onnxfile.reading import read_graph
from reparam.onnxfile.refit import refit
from reparam.onnxfile.weight_map import KEY, Source, WeightMap

NAME = "convolutions"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose values lie beside it."""
    path = tmp_path_factory.mktemp("outside") / "base.onnx"
    export_onnx_model(random_model(NAME, 1), NETWORKS[NAME].specs, path, largest=0)
    return path


def state_of(name: str, seed: int) -> dict[str, Tensor]:
    return {key: x.clone() for key, x in random_model(name, seed).state_dict().items()}


def assert_same_values(path: Path, expected: Path) -> None:
    found, wanted = values_of(path), values_of(expected)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert bits(found[name]) == bits(value), name


@pytest.mark.parametrize(
    ("name", "dtype"), [(NAME, None), (NAME, "fp16"), (NAME, "bf16"), ("sequences", None)]
)
def test_a_refit_is_the_export_of_the_new_weights(
    name: str, dtype: str | None, exports: Exports, tmp_path: Path
) -> None:
    base, _ = exports(name, 1, dtype)
    done = refit(base, state_of(name, 2), tmp_path / "out.onnx")
    assert (done.kept, done.data) == ((), ())
    assert_same_values(tmp_path / "out.onnx", exports(name, 2, dtype)[0])
    assert blanked(tmp_path / "out.onnx") == blanked(base)
    nodes = [
        [node.SerializeToString() for node in onnx.load(p).graph.node] for p in (base, tmp_path / "out.onnx")
    ]
    assert nodes[0] == nodes[1]


def test_the_refitted_file_computes_what_the_new_model_computes(exports: Exports, tmp_path: Path) -> None:
    refit(exports(NAME, 1)[0], state_of(NAME, 2), tmp_path / "out.onnx")
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = random_model(NAME, 2).double()(x.double())
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_a_refit_can_be_refitted(exports: Exports, tmp_path: Path) -> None:
    base, _ = exports(NAME, 1)
    refit(base, state_of(NAME, 2), tmp_path / "there.onnx")
    refit(tmp_path / "there.onnx", state_of(NAME, 1), tmp_path / "back.onnx")
    assert_same_values(tmp_path / "back.onnx", base)


@pytest.mark.parametrize("rename", [False, True])
def test_a_foreign_file_is_understood_by_its_old_weights(
    rename: bool, exports: Exports, tmp_path: Path
) -> None:
    foreign = without_metadata(exports(NAME, 1)[0], tmp_path / "foreign.onnx", rename)
    refit(foreign, state_of(NAME, 2), tmp_path / "out.onnx", old=state_of(NAME, 1))
    expected = without_metadata(exports(NAME, 2)[0], tmp_path / "expected.onnx", rename)
    found, wanted = values_of(tmp_path / "out.onnx"), values_of(expected)
    # The exporter computes ε of a foreign file's batch norms once more: it is among the usual ones here.
    for name, value in wanted.items():
        assert bits(found[name]) == bits(value), name


def test_values_outside_stay_outside(outside: Path, exports: Exports, tmp_path: Path) -> None:
    before = snapshot(outside.parent)
    done = refit(outside, state_of(NAME, 2), tmp_path / "out.partial", target=tmp_path / "out.onnx")
    (data,) = done.data
    assert data.parent == tmp_path
    assert data.name.startswith("out-")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([data.name, "out.partial"])
    assert_same_values(tmp_path / "out.partial", exports(NAME, 2)[0])
    assert blanked(tmp_path / "out.partial") == blanked(outside)
    assert snapshot(outside.parent) == before


def test_tied_initializers_may_share_their_bytes(outside: Path, exports: Exports, tmp_path: Path) -> None:
    model = read_graph(outside)
    model.graph.initializer.add().CopyFrom(next(t for t in model.graph.initializer if t.name == "up.weight"))
    model.graph.initializer[-1].name = "again"
    assert model.graph.initializer[-1].external_data
    sources = WeightMap.load(properties(model)[KEY]).sources
    set_properties(model, {KEY: WeightMap({**sources, "again": sources["up.weight"]}).dump()})
    base = outside.with_name("tied.onnx")
    onnx.save(model, base)
    refit(base, state_of(NAME, 2), tmp_path / "out.onnx")
    values, expected = values_of(tmp_path / "out.onnx"), values_of(exports(NAME, 2)[0])
    assert bits(values.pop("again")) == bits(expected["up.weight"])
    assert {key: bits(x) for key, x in values.items()} == {key: bits(x) for key, x in expected.items()}


def test_metadata_follow_the_weights(exports: Exports, tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    base.write_bytes(exports(NAME, 1)[0].read_bytes())
    annotate(base, {VERIFICATION: "{}", SOURCE: "sha256:old", "author": "somebody"})
    refit(base, state_of(NAME, 2), tmp_path / "out.onnx", metadata={SOURCE: "sha256:new"})
    found = properties(onnx.load(tmp_path / "out.onnx"))
    assert set(found) == {KEY, UNUSED, SOURCE, "author"}
    assert (found[SOURCE], found["author"]) == ("sha256:new", "somebody")


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    merged = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def refused(base: Path, state: dict[str, Tensor], folder: Path, old: dict[str, Tensor] | None = None) -> str:
    """What a refit says that has to fail and to leave nothing."""
    out = folder / "none"
    out.mkdir(exist_ok=True)
    with pytest.raises((ArchitectureError, CheckpointError, NonFiniteError)) as caught:
        refit(base, state, out / "out.onnx", old=old)
    assert list(out.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_named(exports: Exports, outside: Path, tmp_path: Path) -> None:
    state, base = state_of(NAME, 2), exports(NAME, 1)[0]
    for template in (base, outside):
        assert "`head.bias`, which the checkpoint lacks" in refused(
            template, changed(state, head__bias=None), tmp_path
        )
        assert "has no place for `head.scale`" in refused(
            template, changed(state, head__scale=torch.ones(2)), tmp_path
        )
        wrong = refused(template, changed(state, head__weight=torch.ones(4, 6)), tmp_path)
        assert "`head.weight` is [4, 5], `head.weight` of the checkpoint gives [4, 6]" in wrong
        broken = refused(template, changed(state, bn__weight=torch.ones(7)), tmp_path)
        assert "` does not fit `conv.weight" in broken
        assert "NaN" in refused(template, changed(state, head__bias=torch.full((4,), torch.nan)), tmp_path)
    half, large = exports(NAME, 1, "fp16")[0], changed(state, head__bias=torch.full((4,), 7e4))
    assert "`head.bias` is too large for the float16" in refused(half, large, tmp_path)


def test_without_a_map_the_old_weights_are_asked_for(exports: Exports, tmp_path: Path) -> None:
    foreign = without_metadata(exports(NAME, 1)[0], tmp_path / "foreign.onnx")
    state = state_of(NAME, 2)
    assert "--template-weights names the checkpoint" in refused(foreign, state, tmp_path)
    wrong = refused(foreign, state, tmp_path, old=state)
    assert "none of its initializers holds a weight of --template-weights" in wrong
    fresh = NETWORKS[NAME].build().eval()
    export_onnx_model(fresh, NETWORKS[NAME].specs, tmp_path / "fresh.onnx")
    told = refused(tmp_path / "fresh.onnx", state, tmp_path, old=fresh.state_dict())
    assert "which are equal in --template-weights" in told


def test_what_the_old_weights_do_not_explain_must_not_change(exports: Exports, tmp_path: Path) -> None:
    """A constant that was computed from a weight cannot be computed again."""
    foreign = without_metadata(exports(NAME, 1)[0], tmp_path / "foreign.onnx")
    old = {**state_of(NAME, 1), "table": torch.ones(3, 3)}
    state = {**state_of(NAME, 2), "table": torch.ones(3, 3)}
    refit(foreign, state, tmp_path / "out.onnx", old=old)
    assert "has no place for `table`" in refused(
        foreign, {**state, "table": torch.zeros(3, 3)}, tmp_path, old
    )


@pytest.mark.parametrize("text", ["nonsense", '{"a": 1}', '{"a": {"keys": ["a"]}}'])
def test_a_malformed_map_is_refused(text: str, exports: Exports, tmp_path: Path) -> None:
    base = without_metadata(exports(NAME, 1)[0], tmp_path / "base.onnx")
    annotate(base, {KEY: text})
    assert "its map of weights is malformed" in refused(base, state_of(NAME, 2), tmp_path)


def test_a_map_of_another_file_is_refused(exports: Exports, tmp_path: Path) -> None:
    base = without_metadata(exports(NAME, 1)[0], tmp_path / "base.onnx")
    annotate(base, {KEY: WeightMap({"nowhere": Source(("head.bias",))}).dump()})
    only = {"head.bias": torch.ones(4)}
    assert "names an initializer `nowhere`" in refused(base, only, tmp_path)


def test_values_outside_of_the_folder_are_refused(outside: Path, tmp_path: Path) -> None:
    model = read_graph(outside)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{entry.value}"
    onnx.save(model, tmp_path / "base.onnx")
    assert "not in the file's folder: refused" in refused(tmp_path / "base.onnx", state_of(NAME, 2), tmp_path)


@pytest.mark.parametrize("to", ["gmp", "wn"])
def test_a_face_detector_goes_into_its_authors_own_file(to: str, shared: Path, tmp_path: Path) -> None:
    """slim-320: the file of 2019 keeps every name, and its batch norms; converted and folded back, all of it is there."""
    folder = shared / "data" / "checkpoints" / "ultralight_face"
    base = folder / "version-slim-320_without_postprocessing.onnx"
    authors, _ = load_state_dict(folder / "version-slim-320.pth")
    convert_checkpoint(folder / "version-slim-320.pth", to=to, output=tmp_path / "there.safetensors")
    convert_checkpoint(tmp_path / "there.safetensors", to="sp", output=tmp_path / "back.safetensors")
    state, _ = load_state_dict(tmp_path / "back.safetensors")
    done = refit(base, state, tmp_path / "out.onnx", old=authors)
    assert done.kept == ()
    assert len(done.replaced) == len(values_of(base)) == len(authors)
    values = values_of(tmp_path / "out.onnx")
    for key, value in state.items():
        assert bits(values[key]) == bits(value)
    refit(base, authors, tmp_path / "same.onnx", old=authors)
    assert_same_values(tmp_path / "same.onnx", base)
    assert [node.SerializeToString() for node in onnx.load(tmp_path / "out.onnx").graph.node] == [
        node.SerializeToString() for node in onnx.load(base).graph.node
    ]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    x = np.random.default_rng(0).normal(size=(1, 3, 240, 320)).astype(np.float32)
    ran = [
        onnxruntime.InferenceSession(p, options, providers=["CPUExecutionProvider"]).run(None, {"input": x})
        for p in (base, tmp_path / "out.onnx")
    ]
    for expected, found in zip(*ran, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
