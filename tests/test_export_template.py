"""`reparam export --template`: a checkpoint's weights in the graph of a file that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_cases import blanked, values_of, without_metadata
from support import bits, done, refused, run
from template_cases import (
    IMAGE,
    ROW,
    arch,
    bare,
    chain,
    checkpoint,
    normed,
    tabled,
    trained,
)  # fmt: skip
from template_files import BUILD, Templates, assert_computes
from torch import nn

from reparam.export import export_onnx_model
from reparam.graph import fold, parse_spec
from reparam.layers import Reparameterized
from reparam.onnxfile.metadata import CONSTANTS, PARAMETERIZATION, SOURCE, VERIFICATION, VERSION, properties
from reparam.onnxfile.weight_map import KEY, WeightMap

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sp": ("bare", {}),
    "wn": ("bare", {"to": "wn"}),
    "gmp, scales after activations": ("bare", {"to": "gmp"}),
    "gmp+mn": ("bare", {"to": "gmp", "mean_norm": True}),
    "wn+mbn": ("bare", {"to": "wn", "mean_norm": True}),
    "unit": ("bare", {"to": "unit"}),
    "batch norms in gmp": ("normed", {"to": "gmp"}),
    "recurrent gmp+mn": ("reader", {"to": "gmp", "mean_norm": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_alone_give_what_the_folded_network_gives(
    form: str, template: Templates, tmp_path: Path
) -> None:
    """The values are those of an export of the folded network, bit for bit; the graph is the template's."""
    name, options = FORMS[form]
    held = checkpoint(tmp_path / "m.safetensors", trained(BUILD[name][0], 2), **options)
    assert not options or any(isinstance(module, Reparameterized) for module in held.modules())
    base = template(name)
    report = done(
        "export", tmp_path / "m.safetensors", "--template", base, "--onnx", tmp_path / "out.onnx", "--json"
    ).json
    found, expected = values_of(tmp_path / "out.onnx"), fold(held).state_dict()
    if name != "bare":  # where the exporter changes weights, only it can tell
        export_onnx_model(fold(held), [parse_spec(BUILD[name][1])], tmp_path / "expected.onnx")
        expected = values_of(tmp_path / "expected.onnx")
    assert set(expected) <= set(found)
    for key, value in expected.items():
        assert bits(found[key]) == bits(value), key
    assert blanked(tmp_path / "out.onnx") == blanked(base)
    assert report["template"] == str(base)
    assert report["output"] == str(tmp_path / "out.onnx")
    assert report["proofs"] == {"weights": True, "algebra": None, "deployment": True}
    assert [c["name"] for c in report["checks"]] == [
        "weights", "template", "runs in ONNX Runtime", "largest error", "rms error"
    ]  # fmt: skip
    assert any("was not proven" in note for note in report["notes"])


def test_with_the_network_all_is_proven(template: Templates, tmp_path: Path) -> None:
    held = checkpoint(tmp_path / "m.safetensors", trained(normed, 2), to="gmp")
    ran = done(
        "export", tmp_path / "m.safetensors", "--template", template("normed"), "--arch", arch("normed"),
        "--onnx", tmp_path / "out.onnx", "--json",
    )  # fmt: skip
    report = ran.json
    assert report["proofs"] == {"weights": True, "algebra": True, "deployment": True}
    assert [c["name"] for c in report["checks"]] == [
        "template", "weights", "folded model", "graph", "largest error", "rms error"
    ]  # fmt: skip
    assert not any("was not proven" in note for note in report["notes"])
    assert_computes(tmp_path / "out.onnx", held, IMAGE)
    said = properties(onnx.load(tmp_path / "out.onnx"))
    assert {VERSION, SOURCE} <= set(said)
    assert said[PARAMETERIZATION] == "gmp"
    assert json.loads(said[VERIFICATION]) == report["proofs"]


def test_the_report_for_people(template: Templates, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m.safetensors", trained(chain, 2))
    base, out = template("chain"), tmp_path / "out.onnx"
    lines = done("export", tmp_path / "m.safetensors", "--template", base, "--onnx", out).out.splitlines()
    assert lines[0].startswith("ok   weights; 4 initializers, 515 values, bit for bit")
    assert lines[1] == "ok   template; graph and constants are the template's, byte for byte"
    assert lines[-2:] == [f"the graph is that of {base}", f"wrote {out} ({out.stat().st_size / 1e3:.1f} kB)"]
    assert any(line.startswith("note: algebra: not run") for line in lines)


def test_half_precision_comes_with_the_template(template: Templates, tmp_path: Path) -> None:
    held = checkpoint(tmp_path / "m.safetensors", trained(bare, 2), to="gmp")
    base = template("bare", dtype="fp16")
    done("export", tmp_path / "m.safetensors", "--template", base, "--onnx", tmp_path / "out.onnx")
    found = values_of(tmp_path / "out.onnx")
    for key, value in fold(held).state_dict().items():
        assert bits(found[key]) == bits(value.half()), key
    assert {x.dtype for x in found.values() if x.is_floating_point()} == {torch.float16}


def test_a_foreign_file_is_understood_by_its_checkpoint(template: Templates, tmp_path: Path) -> None:
    foreign = without_metadata(template("normed"), tmp_path / "foreign.onnx", rename=True)
    checkpoint(tmp_path / "old.safetensors", trained(normed, 1))
    held = checkpoint(tmp_path / "m.safetensors", trained(normed, 2), to="wn")
    given = ["export", tmp_path / "m.safetensors", "--template", foreign, "--onnx", tmp_path / "out.onnx"]
    refused(*given, naming=("foreign.onnx", "--template-weights"), leaving=tmp_path)
    done(*given, "--template-weights", tmp_path / "old.safetensors")
    assert_computes(tmp_path / "out.onnx", held, IMAGE)


class TestConstants:
    """What is left of the template must not have been computed from weights that are replaced."""

    @pytest.mark.parametrize("name", ["derived", "single"])
    @pytest.mark.parametrize("foreign", [False, True])
    def test_values_computed_from_weights_are_refused(
        self, name: str, foreign: bool, template: Templates, tmp_path: Path
    ) -> None:
        base, more = template(name), list[object]()
        if foreign:
            base = without_metadata(base, tmp_path / "foreign.onnx")
            checkpoint(tmp_path / "old.safetensors", trained(BUILD[name][0], 1))
            more = ["--template-weights", tmp_path / "old.safetensors"]
        checkpoint(tmp_path / "m.safetensors", trained(BUILD[name][0], 2))
        given = ["export", tmp_path / "m.safetensors", "--template", base, "--onnx", tmp_path / "o.onnx"]
        if foreign and name == "single":  # clipping has such values too: told, not refused
            report = done(*given, *more, "--json").json
            assert any(note.startswith("not proven to be constants") for note in report["notes"])
            return
        refused(*given, *more, naming=(base, "computed from", "give --arch"), leaving=tmp_path)
        ran = run(*given, *more, "--arch", arch(name))
        assert ran.code == 1  # the proof sees that they are the old ones

    def test_true_constants_stay(self, template: Templates, tmp_path: Path) -> None:
        base = template("tabled")
        held = checkpoint(tmp_path / "m.safetensors", trained(tabled, 2))
        given = ["export", tmp_path / "m.safetensors", "--template", base, "--onnx", tmp_path / "o.onnx"]
        assert "as in the template" in done(*given).err
        assert_computes(tmp_path / "o.onnx", held, ROW)
        said = properties(onnx.load(tmp_path / "o.onnx"))
        weights = WeightMap.load(said[KEY]).sources
        left = {name for name, x in values_of(base).items() if x.is_floating_point() and name not in weights}
        assert len(left) == 2
        assert set(json.loads(said[CONSTANTS])) == left

    def test_of_a_file_of_others_they_are_not_known(self, template: Templates, tmp_path: Path) -> None:
        foreign = without_metadata(template("tabled"), tmp_path / "foreign.onnx")
        checkpoint(tmp_path / "old.safetensors", trained(tabled, 1))
        held = checkpoint(tmp_path / "m.safetensors", trained(tabled, 2))
        given = [
            "export", tmp_path / "m.safetensors", "--template", foreign, "--onnx", tmp_path / "o.onnx",
            "--template-weights", tmp_path / "old.safetensors",
        ]  # fmt: skip
        refused(*given, naming=(foreign, "give --arch"), leaving=tmp_path)
        done(*given, "--arch", arch("tabled"))
        assert_computes(tmp_path / "o.onnx", held, ROW)


def test_what_wrapped_the_network_is_no_part_of_its_names(template: Templates, tmp_path: Path) -> None:
    held = checkpoint(tmp_path / "m.safetensors", nn.DataParallel(trained(chain, 2)).cpu())
    assert "module.0.weight" in held.state_dict()
    done("export", tmp_path / "m.safetensors", "--template", template("chain"), "--onnx", tmp_path / "o.onnx")
    assert bits(values_of(tmp_path / "o.onnx")["0.weight"]) == bits(held.state_dict()["module.0.weight"])


class TestNegativeScales:
    """r < 0 behind an activation is a sign that tensors alone have no place for."""

    def test_where_consumers_take_it_up_the_network_is_needed(
        self, template: Templates, tmp_path: Path
    ) -> None:
        held = checkpoint(tmp_path / "m.safetensors", trained(chain, 2), to="gmp", negative="0")
        given = [
            "export",
            tmp_path / "m.safetensors",
            "--template",
            template("chain"),
            "--onnx",
            tmp_path / "o.onnx",
        ]
        refused(*given, naming=("m.safetensors", "1 of 64 r of `0`", "give --arch"), leaving=tmp_path)
        done(*given, "--arch", arch("chain"))
        assert_computes(tmp_path / "o.onnx", held, ROW)

    def test_where_nothing_takes_it_up_the_template_lacks_a_multiplication(
        self, template: Templates, tmp_path: Path
    ) -> None:
        checkpoint(tmp_path / "m.safetensors", trained(bare, 2), to="gmp", negative="conv1")
        given = [
            "export",
            tmp_path / "m.safetensors",
            "--template",
            template("bare"),
            "--onnx",
            tmp_path / "o.onnx",
        ]
        refused(*given, naming=("`conv1`", "give --arch"), leaving=tmp_path)
        refused(
            *given,
            "--arch",
            arch("bare"),
            naming=("no multiplication for `conv1_sign`", "without --template"),
            leaving=tmp_path,
        )

    @pytest.mark.parametrize("negative", ["conv1", None])
    def test_a_template_that_has_the_multiplication_takes_any_sign(
        self, negative: str | None, tmp_path: Path
    ) -> None:
        first = checkpoint(tmp_path / "a.safetensors", trained(bare, 1), to="gmp", negative="conv1")
        base = tmp_path / "base.onnx"
        export_onnx_model(fold(first), [parse_spec(IMAGE)], base)
        sources = WeightMap.load(properties(onnx.load(base))[KEY]).sources
        (sign,) = (name for name, source in sources.items() if source.keys == ("conv1_sign",))
        held = checkpoint(tmp_path / "m.safetensors", trained(bare, 2), to="gmp", negative=negative)
        done("export", tmp_path / "m.safetensors", "--template", base, "--onnx", tmp_path / "o.onnx")
        assert bool((values_of(tmp_path / "o.onnx")[sign] < 0).any()) == (negative is not None)
        assert_computes(tmp_path / "o.onnx", held, IMAGE)
