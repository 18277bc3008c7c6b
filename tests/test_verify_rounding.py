"""What is held in a narrow type: exact zeros of angles in a float64 run, and how far right files may be apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from support import convert, done, run, tensors_of
from torch import Tensor, nn

from reparam import pipeline
from reparam.checkpoint import load_state_dict, save_state_dict
from reparam.graph import InputSpec
from reparam.graph import convert as convert_module
from reparam.kernels.operator import compose_rows
from reparam.onnxfile.metadata import PARAMETERIZATION, set_properties
from reparam.onnxfile.weight_map import Source
from reparam.pipeline.exporting import export_skeleton
from reparam.verification import exact, verify_models
from reparam.verification.rounding import TOLERANCE, by_rounding

ARCH = """
from torch import nn
def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.25),
        nn.Conv2d(6, 5, 3), nn.LeakyReLU(0.25), nn.Flatten(), nn.Linear(45, 4),
    )
"""
SPECS = [InputSpec("input", ("N", 1, 7, 7))]
INPUT = ("--input", "N,1,7,7")
ROUNDED = (
    "weights differ by rounding alone: the file was exported from a gmp checkpoint; verify against that one"
)


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(ARCH)
    return f"{tmp_path / 'net.py'}:net"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    scope: dict[str, Callable[[], nn.Sequential]] = {}
    exec(ARCH, scope)
    return scope["net"]().eval()


# --- exact zeros in float64


def zero_last(weight: Tensor) -> None:
    """One zero, where a row ends: the last angle alone says so."""
    weight[0].view(-1)[-1] = 0


def zero_tail(weight: Tensor) -> None:
    """All that follows a right angle."""
    weight[1].view(-1)[weight[1].numel() // 2 :] = 0


def zero_row(weight: Tensor) -> None:
    weight[1] = 0


def masked(weight: Tensor) -> None:
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0


def pruned(change: Callable[[Tensor], None]) -> nn.Sequential:
    model = network()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                change(layer.weight)
    return model


@pytest.mark.parametrize("change", [zero_last, zero_tail, zero_row, masked])
def test_a_pruned_network_is_exported_from_its_angles(
    change: Callable[[Tensor], None], arch: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "model.safetensors", tmp_path / "model.gmp.safetensors"
    save_file(pruned(change).state_dict(), source)
    convert(source, "gmp", out)
    done("export", out, "--arch", arch, *INPUT, "--onnx", tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    weight = next(t for t in graph.initializer if t.name == "3.weight")
    zeros = torch.from_numpy(numpy_helper.to_array(weight).copy()) == 0
    assert torch.equal(zeros, tensors_of(source)["3.weight"] == 0)
    assert zeros.any()


def test_a_pruned_network_with_normalized_means_has_a_skeleton(tmp_path: Path) -> None:
    model = convert_module(pruned(masked), "gmp", mean_norm=True)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_input_mean"):
                value.normal_(generator=torch.Generator().manual_seed(2))
    assert export_skeleton(model, SPECS, tmp_path / "skeleton.onnx").passed


def test_angles_keep_the_type_they_are_stored_in() -> None:
    """π/2 in float32 is the right angle in a float64 run too; in float64 it is an angle like any other."""
    theta = torch.tensor([[0.3, torch.pi / 2]], dtype=torch.float32)

    def rows(stored: torch.dtype) -> Tensor:
        wide = exact.Float64()
        with wide:
            return compose_rows(None, theta, 3, stored, torch.float32)

    assert rows(torch.float32).dtype == torch.float64
    assert rows(torch.float32)[0, 2] == 0
    assert rows(torch.float64)[0, 2] != 0


def test_bits_are_read_in_the_type_they_are_of() -> None:
    bits = torch.tensor([1.5, -2.25]).view(torch.int32)
    with exact.Float64():
        read = bits.view(torch.float32) * 1
        assert read.dtype == torch.float64
    assert read.tolist() == [1.5, -2.25]


# --- two checkpoints


def test_pairs_of_checkpoints_are_held_to_what_rounding_explains(arch: str, tmp_path: Path) -> None:
    """The bound that ``convert`` tells of the same pair; a layer off by 1e-3 is outside of it, one at 1e-10 inside."""
    source, out = tmp_path / "model.safetensors", tmp_path / "whole.gmp.safetensors"
    save_file(network().state_dict(), source)
    told = convert(source, "gmp", out, "--arch", arch, "--fold-bn", "--mean-norm", *INPUT)["outputs"]
    for pair in ((source, out), (out, source)):
        (check,) = done("verify", *pair, "--arch", arch, *INPUT, "--json").json["checks"]
        assert 1e-9 < check["max_rel"] <= check["tolerance"] < 1e-4
    forth = done("verify", source, out, "--arch", arch, *INPUT, "--json").json["checks"][0]
    assert (forth["max_rel"], forth["tolerance"]) == pytest.approx(
        (told["max_rel"], told["tolerance"]), rel=1e-6
    )
    tensors, records = load_state_dict(out)
    for key in ("0.r", "3.theta", "6.weight"):
        wrong = {k: v * (1 + 1e-3) if k == key else v for k, v in tensors.items()}
        save_state_dict(wrong, records, tmp_path / "wrong.safetensors", force=True)
        ran = run("verify", source, tmp_path / "wrong.safetensors", "--arch", arch, *INPUT)
        assert ran.code == 1, key
        assert "FAIL models" in ran.out


def test_float64_checkpoints_are_held_to_float64(arch: str, tmp_path: Path) -> None:
    """Whatever the network is built in: 1e-10 off is off."""
    state = {k: v.double() if v.is_floating_point() else v for k, v in network().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    wn = tmp_path / "a.wn.safetensors"
    convert(tmp_path / "a.safetensors", "wn", wn, "--arch", arch)
    (check,) = done("verify", tmp_path / "a.safetensors", wn, "--arch", arch, *INPUT, "--json").json["checks"]
    assert check["tolerance"] <= 1e-11
    state["3.weight"] = state["3.weight"] * (1 + 1e-10)
    save_file(state, tmp_path / "b.safetensors")
    assert run("verify", wn, tmp_path / "b.safetensors", "--arch", arch, *INPUT).code == 1


def test_a_coarser_copy_is_held_to_its_own_type(arch: str, tmp_path: Path) -> None:
    state = network().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    for name, factor in (("b", 1.0), ("c", 1.5)):
        half = {k: (v * factor).bfloat16() if v.is_floating_point() else v for k, v in state.items()}
        save_file(half, tmp_path / f"{name}.safetensors")
    codes = [
        run(
            "verify", tmp_path / "a.safetensors", tmp_path / f"{name}.safetensors", "--arch", arch, *INPUT
        ).code
        for name in "bc"
    ]
    assert codes == [0, 1]


class Two(nn.Module):
    """A quiet output beside one that rounding moves seven times as much, in bfloat16, and an index."""

    def __init__(self, quiet: float = 1.0, last: float = 1.0) -> None:
        super().__init__()
        self.quiet = nn.Parameter(torch.tensor([quiet], dtype=torch.bfloat16))
        rows = [[1.0] * 7, [1.0] * 6 + [last]]
        self.scores = nn.Parameter(torch.tensor(rows, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = (x.abs() + 1) @ self.scores.T
        return x * self.quiet, (scores - 7) / 1e-3, scores.argmax(1)


@pytest.mark.parametrize(("quiet", "passes"), [(1 + 2.0**-7, True), (1.25, False)])
def test_each_output_is_held_to_its_own_rounding(quiet: float, passes: bool) -> None:
    specs = [InputSpec("x", ("N", 7))]
    report = verify_models(Two(), Two(quiet), specs, rounded=True)
    assert report.passed is passes, report.lines()
    assert not verify_models(Two(), Two(quiet), specs).passed


def test_indices_may_differ_where_rounding_decides() -> None:
    """By a unit in the last place of one score, not by a quarter."""
    specs = [InputSpec("x", ("N", 7))]
    near = Two(last=1 + 2.0**-7)
    assert verify_models(near, Two(), specs, rounded=True).passed
    assert not verify_models(near, Two(), specs).passed
    report = verify_models(Two(last=1.25), Two(), specs, rounded=True)
    assert [check.where for check in report.failures if "values differ" in (check.where or "")]


class Cut(nn.Module):
    """Its output is as wide as a number says that no rounding may move."""

    def __init__(self) -> None:
        super().__init__()
        self.ones = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : 3 if bool((self.ones >= 1).all()) else 2]


def test_a_shape_that_rounding_changes_excuses_nothing() -> None:
    report = verify_models(Cut(), Cut(), [InputSpec("x", ("N", 7))], rounded=True)
    assert [(check.passed, check.tolerance) for check in report.checks] == [(True, TOLERANCE)]


# --- an ONNX file and a checkpoint it was not exported from


def test_weights_that_differ_by_rounding_name_the_checkpoint_they_are_of(arch: str, tmp_path: Path) -> None:
    source, gmp, file = (tmp_path / name for name in ("model.safetensors", "model.gmp.safetensors", "m.onnx"))
    save_file(network().state_dict(), source)
    convert(source, "gmp", gmp)
    pipeline.export_onnx(gmp, arch, SPECS, file)

    def told(reference: Path, candidate: Path = file) -> tuple[bool, bool]:
        report = done if reference == gmp and candidate == file else run
        value = report("verify", reference, candidate, "--arch", arch, *INPUT, "--json").json
        return value["proofs"]["weights"], ROUNDED in value["notes"]

    assert told(gmp) == (True, False)
    assert told(source) == (False, True)
    assert f"note: {ROUNDED}" in run("verify", source, file, "--arch", arch, *INPUT).out
    # Not rounding: one small weight is off by 1e-5 of the largest of its row.
    state = load_file(source)
    state["3.weight"][2, 0, 0, 0] += 1e-5 * state["3.weight"][2].abs().max()
    save_file(state, tmp_path / "other.safetensors")
    assert told(tmp_path / "other.safetensors") == (False, False)
    # Rounding, but the checkpoint is the one it was exported from: the file is damaged.
    model = onnx.load(file)
    tensor = next(t for t in model.graph.initializer if t.name == "3.weight")
    value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(torch.inf))
    tensor.CopyFrom(numpy_helper.from_array(value.numpy(), "3.weight"))
    onnx.save(model, tmp_path / "damaged.onnx")
    assert told(gmp, tmp_path / "damaged.onnx") == (False, False)
    # How a checkpoint held its layers, in words; a file that does not say is not guessed at.
    for held, named in (("sp+wn", "a wn"), ("sp", "an sp"), (None, None)):
        model = onnx.load(file)
        set_properties(model, {} if held is None else {PARAMETERIZATION: held}, without=(PARAMETERIZATION,))
        onnx.save(model, tmp_path / "told.onnx")
        notes = run("verify", source, tmp_path / "told.onnx", "--arch", arch, *INPUT, "--json").json["notes"]
        expected = [] if named is None else [ROUNDED.replace("a gmp", named)]
        assert [note for note in notes if "rounding alone" in note] == expected


def test_rounding_is_measured_by_the_row() -> None:
    """Units in the last place of the row's largest weight, through a transposition; a bias's by the largest of all."""
    weight = torch.tensor([[1.0, 1e-3], [1e-6, 1e-7]])
    state, source = {"w": weight, "b": weight[0]}, Source(("w",), "transpose", {"perm": [1, 0]})
    ulp = torch.finfo(torch.float32).eps
    off = torch.zeros(2, 2)
    off[1, 0] = 3 * ulp  # the 1e-3, beside 1
    assert by_rounding(weight.T + off, weight.T, source, state)
    assert not by_rounding(weight.T + 4 * off, weight.T, source, state)
    assert not by_rounding(weight.T + off.T, weight.T, source, state)  # the 1e-6
    bias = Source(("b",))
    assert by_rounding(weight[0] + off[1, 0], weight[0], bias, state)
    assert not by_rounding(weight[0] + 4 * off[1, 0], weight[0], bias, state)
    assert not by_rounding(torch.tensor([1, 2]), torch.tensor([1, 3]), Source(("i",)), {})
