"""`reparam export --template`: what is written, what is refused, and that nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from export_cases import values_of
from support import bits, done, python, refused, run, snapshot
from template_cases import (
    ROW,
    arch,
    bare,
    chain,
    checkpoint,
    normed,
    trained,
)  # fmt: skip
from template_files import Templates

import reparam.onnxfile.refit
from reparam.onnxfile.weight_map import WeightMap
from reparam.verification.template import check_template


def test_what_does_not_fit_is_one_line(template: Templates, tmp_path: Path) -> None:
    base, out = template("bare"), tmp_path / "out.onnx"
    checkpoint(tmp_path / "other.safetensors", trained(chain, 2))
    checkpoint(tmp_path / "m.safetensors", trained(bare, 2))
    checkpoint(tmp_path / "normed.safetensors", trained(normed, 2), to="gmp", mean_norm=True)
    m = tmp_path / "m.safetensors"
    (tmp_path / "nothing.onnx").write_bytes(b"")
    cases: list[tuple[list[object], tuple[object, ...]]] = [
        ([tmp_path / "other.safetensors", "--template", base], (base, "`conv1.bias`", "--arch")),
        ([m, "--template", template("chain")], ("lacks", "--arch")),
        # A mean was normalized, and the layer gained a bias that the template's does not have.
        ([tmp_path / "normed.safetensors", "--template", template("chain")], ("lacks",)),
        ([m, "--template", m], ("--template", m, "not an ONNX file")),
        ([m, "--template", tmp_path / "nothing.onnx"], ("--template", "nothing.onnx")),
        ([m, "--template", tmp_path / "none.onnx"], ("--template", "none.onnx")),
        ([m, "--template", base, "--opset", "20"], ("--opset", base)),
        ([m, "--template", base, "--dtype", "fp16"], ("--dtype", base)),
        ([m, "--template-weights", m], ("--template-weights", "--template")),
        ([m, "--template", base, "--input", "N,3,16,16", "--input", "N,3"], ("--input", "2 given")),
        ([tmp_path / "none.safetensors", "--template", base], ("none.safetensors",)),
    ]
    for options, naming in cases:
        refused("export", *options, "--onnx", out, naming=naming, leaving=tmp_path)


def test_the_template_is_never_written(template: Templates, tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    base.write_bytes(template("chain").read_bytes())
    (tmp_path / "same.onnx").symlink_to(base)
    checkpoint(tmp_path / "m.safetensors", trained(chain, 2))
    for out in (base, tmp_path / "same.onnx"):
        refused(
            "export", tmp_path / "m.safetensors", "--template", base, "--onnx", out, "--force",
            naming=(out, "the template itself"), leaving=tmp_path,
        )  # fmt: skip


def test_nothing_is_overwritten_unasked(template: Templates, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m.safetensors", trained(chain, 2))
    out = tmp_path / "out.onnx"
    out.write_bytes(b"mine")
    given = ["export", tmp_path / "m.safetensors", "--template", template("chain"), "--onnx", out]
    refused(*given, naming=(out, "--force"), leaving=tmp_path)
    done(*given, "--force")
    onnx.checker.check_model(out)


def test_a_file_that_is_wrong_never_gets_the_name(
    template: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one weight changes between refit and proof."""
    refit = reparam.onnxfile.refit.refit

    def faulty(base: Path, state: Any, out: Path, **options: Any) -> Any:
        finished = refit(base, state, out, **options)
        model = onnx.load(out)
        tensor = next(t for t in model.graph.initializer if t.name == "2.weight")
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
        onnx.save(model, out)
        return finished

    monkeypatch.setattr(reparam.onnxfile.refit, "refit", faulty)
    checkpoint(tmp_path / "m.safetensors", trained(chain, 2))
    out = tmp_path / "out.onnx"
    out.write_bytes(b"the last good one")
    for more in ([], ["--arch", arch("chain")]):
        given = [
            "export",
            tmp_path / "m.safetensors",
            "--template",
            template("chain"),
            "--onnx",
            out,
            "--force",
        ]
        ran = run(*given, *more, "--json")
        assert ran.code == 1
        assert ran.json["passed"] is False
        assert "`2.weight`" in ran.err
        assert out.read_bytes() == b"the last good one"
        assert (tmp_path / "out.failed.onnx").exists()


class TestValuesOutside:
    """Templates whose values lie in a data file beside them."""

    def refit(self, base: Path, out: Path, seed: int, *options: object) -> dict[str, Any]:
        path = out.with_name(f"{seed}.safetensors")
        checkpoint(path, trained(chain, seed))
        return done("export", path, "--template", base, "--onnx", out, "--json", *options).json

    def data(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.glob("*.data"))

    def test_stay_outside(self, template: Templates, tmp_path: Path) -> None:
        base = template("chain", largest=0)
        before = snapshot(base.parent)
        assert self.refit(base, tmp_path / "out.onnx", 2)["passed"]
        (name,) = self.data(tmp_path)
        assert name.startswith("out-")
        assert bits(values_of(tmp_path / "out.onnx")["0.weight"]) == bits(
            trained(chain, 2).state_dict()["0.weight"]
        )
        assert snapshot(base.parent) == before

    def test_the_replaced_file_takes_its_data_with_it(self, template: Templates, tmp_path: Path) -> None:
        base, out = template("chain", largest=0), tmp_path / "out.onnx"
        others = ["out-0123456789abcdef.data", "out-mine.data", "other-0123456789abcdef.data"]
        self.refit(base, out, 2)
        (first,) = self.data(tmp_path)
        for name in others:  # which no ONNX file names
            (tmp_path / name).write_bytes(b"mine")
        self.refit(base, out, 3, "--force")
        second = set(self.data(tmp_path)) - set(others)
        assert len(second) == 1
        assert first not in second
        self.refit(base, out, 3, "--force")  # the same values again: the file is needed still
        assert set(self.data(tmp_path)) == second | set(others)
        assert bits(values_of(out)["0.weight"]) == bits(trained(chain, 3).state_dict()["0.weight"])

    def test_but_not_what_another_file_names(self, template: Templates, tmp_path: Path) -> None:
        base, out = template("chain", largest=0), tmp_path / "out.onnx"
        self.refit(base, out, 2)
        (first,) = self.data(tmp_path)
        (tmp_path / "kept.onnx").write_bytes(out.read_bytes())
        self.refit(base, out, 3, "--force")
        assert first in self.data(tmp_path)
        assert len(self.data(tmp_path)) == 2

    def test_what_fails_leaves_none(
        self, template: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, out = template("chain", largest=0), tmp_path / "out.onnx"
        self.refit(base, out, 2)
        checkpoint(tmp_path / "3.safetensors", trained(chain, 3))
        before = snapshot(tmp_path)

        def full(*args: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        # After the data file is whole, and before the ONNX file is.
        monkeypatch.setattr(reparam.onnxfile.refit, "set_properties", full)
        ran = run("export", tmp_path / "3.safetensors", "--template", base, "--onnx", out, "--force")
        assert ran.code == 2
        assert "disk is full" in ran.err
        assert snapshot(tmp_path) == before

    def test_a_changed_constant_outside_is_seen(self, template: Templates, tmp_path: Path) -> None:
        """Padding between the values is no constant; a tensor that no weight is known for is one."""
        base = template("chain", largest=0)
        (data,) = base.parent.glob("*.data")
        for name in (base.name, data.name):
            (tmp_path / name).write_bytes((base.parent / name).read_bytes())
        nothing = WeightMap({})
        assert check_template(base, tmp_path / base.name, nothing).passed
        changed = bytearray(data.read_bytes())
        changed[0] ^= 1
        (tmp_path / data.name).write_bytes(changed)
        assert not check_template(base, tmp_path / base.name, nothing).passed


KILLED = """
import os, sys
from pathlib import Path
from reparam import pipeline
import reparam.onnxfile.refit as refitting
from reparam.onnxfile.external import DataWriter
import reparam.verification.refitted as proving

def die(*args, **kwargs):
    os._exit(9)

moment = sys.argv[4]
if moment == "data":
    DataWriter.finish = die
elif moment == "graph":
    refitting.set_properties = die
else:
    proving.verify_refit = die
pipeline.export_onnx(Path(sys.argv[1]), None, [], Path(sys.argv[3]), template=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", ["data", "graph", "proof"])
def test_a_killed_refit_leaves_nothing_under_the_name(
    moment: str, template: Templates, tmp_path: Path
) -> None:
    """The next run to the same place removes what is left and succeeds."""
    base, out = template("chain", largest=0), tmp_path / "out.onnx"
    checkpoint(tmp_path / "m.safetensors", trained(chain, 2))
    ran = python(KILLED, tmp_path / "m.safetensors", base, out, moment)
    assert ran.returncode == 9, ran.stderr
    assert not out.exists()
    done("export", tmp_path / "m.safetensors", "--template", base, "--onnx", out)
    assert not list(tmp_path.glob(".*partial"))
    assert len(list(tmp_path.glob("*.data"))) == 1


def test_without_anything_that_tells_the_network(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model.gmp.safetensors", trained(chain, 2), to="gmp")
    for more in ([], ["--input", ROW]):
        ran = run("export", tmp_path / "model.gmp.safetensors", "--onnx", tmp_path / "out.onnx", *more)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == (
            "error: `model.gmp.safetensors` holds weights, not a network: give --arch file.py:fn, --template base.onnx "
            "or a folder with config.json; for plain weights only: reparam convert … --to sp\n"
        )
