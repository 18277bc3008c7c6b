"""From a converted file on: fine-tuning, exporting, going back to plain weights."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from arch_cases import write_arch, write_checkpoint
from graph_cases import difference, noise
from safetensors.torch import save_file
from support import done, records_of, refused, tensors_of
from torch import nn

import reparam.demo.model as demo_model
from reparam.checkpoint import load_state_dict, save_state_dict
from reparam.graph.rewritten import Rewritten
from reparam.pipeline.loading import load_network

BUNDLED = Path(demo_model.__file__).parent / "data"
DEMO = "reparam.demo.model:small_cnn"


@pytest.fixture
def arch(tmp_path: Path) -> str:
    return write_arch(tmp_path)


@pytest.fixture
def source(arch: str, tmp_path: Path) -> Path:
    return write_checkpoint(arch, tmp_path)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo network: batch norms folded, means normalized and calibrated on real images, trained a little."""
    folder = tmp_path_factory.mktemp("demo")
    command = ["--arch", DEMO, "--to", "gmp", "--fold-bn", "--mean-norm", "--calibrate", BUNDLED]
    done("convert", BUNDLED / "small_cnn.safetensors", *command, "-o", folder / "cnn.gmp.safetensors")
    data = ["--data", BUNDLED, "--steps", 2, "--batch-size", 32]
    ran = done(
        "finetune", folder / "cnn.gmp.safetensors", "--arch", DEMO, *data, "-o", folder / "run", "--json"
    )
    before = done(
        "finetune", BUNDLED / "small_cnn.safetensors", "--arch", DEMO, *data, "-o", folder / "p", "--json"
    )
    # the conversion changed no prediction
    assert ran.json["before"]["value"] == before.json["before"]["value"]
    return folder / "run" / "last.safetensors"


def test_fine_tuning_trains_and_keeps_the_records(fine_tuned: Path) -> None:
    source = fine_tuned.parent.parent / "cnn.gmp.safetensors"
    assert records_of(fine_tuned) == records_of(source)
    record = records_of(fine_tuned)["conv1.weight"]
    assert (record["scale"], record["mean"], record["batch_norm"]) == ("outside", "mn", "bn1")
    before, after = tensors_of(source), tensors_of(fine_tuned)
    assert {key: value.dtype for key, value in after.items()} == {k: v.dtype for k, v in before.items()}
    for key in ("conv1.r", "conv2.theta", "conv3.lambda_", "conv2.running_input_mean", "head.weight"):
        assert not torch.equal(before[key], after[key]), key


def negative(file: Path, out: Path) -> nn.Module:
    """The file with some r of conv1 and conv3 negative, as training may make them; the network that holds it."""
    tensors, records = load_state_dict(file)
    for key in ("conv1.r", "conv3.r"):
        tensors[key][::3] *= -1
    save_state_dict(tensors, records, out)
    return load_network(out, DEMO, None).model.eval()


def test_negative_scales_are_exported(fine_tuned: Path, tmp_path: Path) -> None:
    """conv1's signs go past its max-pool, where the scale stands, into conv2; conv3's past the average into the head."""
    model = negative(fine_tuned, tmp_path / "n.safetensors")
    assert isinstance(model, Rewritten)
    ran = done(
        "export", tmp_path / "n.safetensors", "--arch", DEMO, "--input", "N,1,28,28", "--onnx", tmp_path / "n.onnx", "--json",
    )  # fmt: skip
    assert ran.json["passed"] is True
    assert "Mul" not in {node.op_type for node in onnx.load(tmp_path / "n.onnx").graph.node}


def test_and_go_back_to_plain_weights(fine_tuned: Path, tmp_path: Path) -> None:
    model = negative(fine_tuned, tmp_path / "n.safetensors").double()
    refused(
        "convert", tmp_path / "n.safetensors", "--to", "sp", naming=("network", "--arch"), leaving=tmp_path
    )
    done(
        "convert", tmp_path / "n.safetensors", "--to", "sp", "--arch", DEMO, "-o", tmp_path / "sp.safetensors"
    )
    plain = load_network(tmp_path / "sp.safetensors", DEMO, None).model.eval().double()
    assert type(plain) is demo_model.SmallCNN
    # both rounded to float32: of the weights once more
    assert difference(plain, model, noise(2, 1, 28, 28)) <= 2e-6


def test_a_sign_no_file_can_hold_is_refused(arch: str, source: Path, tmp_path: Path) -> None:
    """A residual addition takes what conv1 computes as well: its signs need a multiplication."""
    done("convert", source, "--arch", arch, "--to", "gmp", "--fold-bn", "-o", tmp_path / "g.safetensors")
    tensors, records = load_state_dict(tmp_path / "g.safetensors")
    tensors["conv1.r"][1] *= -1
    save_state_dict(tensors, records, tmp_path / "n.safetensors")
    refused(
        "convert", tmp_path / "n.safetensors", "--arch", arch, "--to", "sp",
        naming=("multiplication", "export"), leaving=tmp_path,
    )  # fmt: skip
    ran = done(
        "export",
        tmp_path / "n.safetensors",
        "--arch",
        arch,
        "--input",
        "N,3,6,6",
        "--onnx",
        tmp_path / "n.onnx",
    )
    assert "ok" in ran.out


def test_fine_tuning_a_file_of_old_torch(tmp_path: Path) -> None:
    """Without batch norm's counters, and wrapped."""
    tensors, _ = load_state_dict(BUNDLED / "small_cnn.safetensors")
    state = {
        f"module.{key}": value for key, value in tensors.items() if not key.endswith("num_batches_tracked")
    }
    save_file(state, tmp_path / "old.safetensors")
    ran = done(
        "finetune", tmp_path / "old.safetensors", "--arch", DEMO, "--data", BUNDLED, "--steps", 1, "-o", tmp_path / "run",
        "--json",
    )  # fmt: skip
    assert "`module.` stands before every name" in ran.err
    assert json.loads(ran.out)["step"] == 1
    assert "conv1.weight" in tensors_of(tmp_path / "run" / "last.safetensors")
