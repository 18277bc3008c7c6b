"""Fine-tuning as a command and as one call: from a checkpoint or new values to a run that exports without its source."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from training_cases import NET

import reparam.demo.model as demo_model
from cli.main import main
from reparam import pipeline
from reparam.checkpoint import convert_checkpoint, load_state_dict
from reparam.errors import ArchitectureError, CheckFailedError, DataError, OutputError, ReparamError
from reparam.graph import apply_records, fold
from reparam.layers import GmPConv2d
from reparam.training import Recipe, RunFolder

BUNDLED = Path(demo_model.__file__).parent / "data"
ARCH = "reparam.demo.model:small_cnn"
NO_LOSS = 0.01  # of test accuracy: ten of the 1,000 images, one standard error
SHORT = Recipe(steps=3, batch_size=32)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gmp") / "cnn.gmp.safetensors"
    convert_checkpoint(BUNDLED / "small_cnn.safetensors", to="gmp", output=path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return str(tmp_path / "net.py")


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def weights(file: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(file)[0]


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_gmp_fine_tuning_keeps_the_accuracy_and_moves_the_angles(converted: Path, tmp_path: Path) -> None:
    run = pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", Recipe(steps=50))
    assert run.result.before.value == 0.864
    assert run.result.best.value >= run.result.before.value - NO_LOSS
    before, records = load_state_dict(converted)
    after, kept = load_state_dict(run.best)
    assert kept == records
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert not torch.equal(after["conv1.theta"], before["conv1.theta"])
    assert int(after["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"]) == run.result.best.step
    # The best checkpoint is the user's own class again once folded, and as good as the run says it is.
    model = apply_records(demo_model.small_cnn(), kept)
    model.load_state_dict(after)
    folded, plain = fold(model.eval()), demo_model.small_cnn().eval()
    plain.load_state_dict(folded.state_dict())
    from reparam.training.data import Batches, load_data

    data = load_data(str(BUNDLED))
    images, labels = next(Batches(data, data.validation, batch_size=1000, shuffle=False).epoch(0))
    assert float((plain(images).argmax(1) == labels).double().mean()) == run.result.best.value


def test_a_run_says_what_it_was(converted: Path, tmp_path: Path) -> None:
    run = pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", SHORT)
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (config["steps"], config["batch_size"]) == (3, 32)
    assert config["network"]["arch"] == ARCH
    assert config["network"]["input"] == [1, 28, 28]
    assert config["network"]["classes"] == [str(i) for i in range(10)]
    assert [line["step"] for line in evaluations(run.folder)] == [0, 3]
    with pytest.raises(OutputError, match=r"holds a run already: --resume continues it, --force replaces it"):
        pipeline.finetune(converted, ARCH, BUNDLED, run.folder, SHORT)


def test_best_exports_from_its_run_without_the_network(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime as ort

    run = pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", SHORT)
    for source in (run.folder, run.best):
        assert main(["export", str(source), "--onnx", str(tmp_path / "m.onnx"), "--force"]) == 0
        capsys.readouterr()
    model = apply_records(demo_model.small_cnn(), load_state_dict(run.best)[1])
    model.load_state_dict(weights(run.best))
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = model.double().eval()(x.double()).detach().numpy()
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_from_scratch_converted_trained_and_exported_in_four_commands(
    net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch, data = ["--arch", f"{net}:net"], str(BUNDLED)
    sp, gmp, run = tmp_path / "sp", tmp_path / "model.gmp.safetensors", tmp_path / "run"
    short = ["--steps", "6", "--batch-size", "100", "--lr", "0.05"]
    commands: list[Sequence[str | Path]] = [
        ["finetune", "--scratch", *arch, "--data", data, "-o", sp, *short],
        [
            "convert",
            sp / "best.safetensors",
            *arch,
            "--to",
            "gmp",
            "--mean-norm",
            "--calibrate",
            data,
            "-o",
            gmp,
        ],
        ["finetune", gmp, *arch, "--data", data, "-o", run, *short],
        ["export", run, "--onnx", tmp_path / "model.onnx"],
    ]
    for command in commands:
        assert main([*map(str, command)]) == 0, capsys.readouterr().err
    records = load_state_dict(run / "best.safetensors")[1]
    assert {record.kind for record in records.values()} == {"gmp"}
    assert evaluations(run)[0]["accuracy"] == pytest.approx(evaluations(sp)[-1]["accuracy"], abs=2e-3)
    assert evaluations(sp)[-1]["accuracy"] > 0.3
    assert (tmp_path / "model.onnx").exists()


def test_converting_on_the_way_is_converting_first(converted: Path, tmp_path: Path) -> None:
    plain = BUNDLED / "small_cnn.safetensors"
    run = pipeline.finetune(
        plain, ARCH, BUNDLED, tmp_path / "a", SHORT, to="gmp", mean_norm=True, fold_bn=True
    )
    tensors, records = load_state_dict(run.best)
    assert records["conv2.weight"].mean == "mn"
    assert "conv2.running_input_mean" in tensors
    assert not any(key.startswith("bn") for key in tensors)
    # Calibrated: the accuracy before the first step is the checkpoint's.
    assert run.result.before.value == pytest.approx(0.864, abs=2e-3)


@pytest.mark.parametrize(
    ("to", "placed"), [("wn", ""), ("gmp", ", place scale 3×")],
)  # fmt: skip
def test_what_a_conversion_on_the_way_did_is_told(to: str, placed: str) -> None:
    """By the rules' names, which are the same for every parameterization."""
    from reparam.pipeline import set_up

    def told(mean_norm: bool) -> str:
        plain = BUNDLED / "small_cnn.safetensors"
        notes = set_up(plain, ARCH, str(BUNDLED), SHORT, to=to, mean_norm=mean_norm, fold_bn=True).notes
        return next(note for note in notes if note.startswith("converted to"))

    means = ", mean normalization 3×, calibrate 3×"
    assert told(True) == f"converted to {to}: fold batch norm 3×, swap 3×{placed}{means}"
    assert told(False) == f"converted to {to}: fold batch norm 3×, swap 3×{placed}"


def test_what_was_asked_for_in_vain_is_told(net: str, tmp_path: Path) -> None:
    from reparam.graph import load_architecture
    from reparam.pipeline import set_up

    torch.save(load_architecture(f"{net}:net").state_dict(), tmp_path / "net.pt")
    setup = set_up(tmp_path / "net.pt", f"{net}:net", str(BUNDLED), SHORT, to="wn", fold_bn=True)
    assert "converted to wn: swap 1×, fold batch norm nowhere" in setup.notes


@pytest.mark.parametrize("init", ["paper", "glorot", "data"])
def test_new_values(init: str, converted: Path, tmp_path: Path) -> None:
    from reparam.pipeline import set_up

    recipe = Recipe(steps=1, batch_size=32, scratch=True, init=init)
    models = [set_up(converted, ARCH, str(BUNDLED), recipe).model for _ in range(2)]
    layer = models[0].conv2
    assert isinstance(layer, GmPConv2d)
    assert not torch.equal(layer.theta, weights(converted)["conv2.theta"])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    if init == "paper":
        assert torch.equal(layer.r, torch.ones_like(layer.r))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", str(converted), "--arch", ARCH, "--data", str(BUNDLED), "--batch-size", "64"]
    assert main([*command, "-o", str(tmp_path / "whole"), "--steps", "5"]) == 0
    assert main([*command, "-o", str(tmp_path / "parts"), "--steps", "3"]) == 0
    assert main([*command, "-o", str(tmp_path / "parts"), "--steps", "5", "--resume"]) == 0
    assert same(tmp_path / "whole" / "last.safetensors", tmp_path / "parts" / "last.safetensors")
    assert yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())["steps"] == 5
    before = (tmp_path / "parts" / "config.yaml").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(BUNDLED, other, ignore=lambda *_: ["t10k-images-idx3-ubyte.gz"])
    images = bytearray(gzip.decompress((BUNDLED / "t10k-images-idx3-ubyte.gz").read_bytes()))
    images[16 + 300] ^= 1  # one pixel of the first image
    (other / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(images)))
    for options, told in (
        (["--lr", "0.5"], "--lr"),
        (["--arch-arg", "num_classes=10"], "the run has --arch-args {}"),
        (["--to", "gmp"], "the run has --to None, not gmp"),
        (["--data", str(other)], "the run's data has samples"),
        (["--schedule", "cosine"], "--schedule"),
    ):
        capsys.readouterr()
        assert main([*command, "-o", str(tmp_path / "parts"), "--resume", *options]) == 2
        assert told in capsys.readouterr().err
    assert (tmp_path / "parts" / "config.yaml").read_bytes() == before
    # Killed before its first save: from the beginning.
    (tmp_path / "parts" / "state.pt").unlink()
    assert main([*command, "-o", str(tmp_path / "parts"), "--steps", "5", "--resume"]) == 0
    assert same(tmp_path / "whole" / "last.safetensors", tmp_path / "parts" / "last.safetensors")
    assert main([*command, "-o", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_regression_from_a_table_and_from_the_users_own_code(net: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 2))
    rows = np.column_stack([x, x @ [2.0, -1.0] + 0.5])
    np.savetxt(tmp_path / "set.csv", rows, delimiter=",", header="a,b,y", comments="")
    recipe = Recipe(scratch=True, epochs=20, batch_size=10, lr=0.05, task="regress")
    for data in (tmp_path / "set.csv", f"{net}:line"):
        out = tmp_path / Path(str(data)).suffix[1:4]
        run = pipeline.finetune(None, f"{net}:mlp", data, out, recipe)
        assert run.result.best.metric == "rmse"
        assert run.result.best.value < run.result.before.value / 2


def test_dry_run_and_print_config_write_nothing(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["finetune", str(converted), "--arch", ARCH, "--data", str(BUNDLED), "--epochs", "2", "--flip"]
    assert main([*command, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    groups = {group["kind"]: group for group in told["groups"]}
    model = demo_model.small_cnn()
    assert groups["r"]["numbers"] == sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    assert groups["theta"]["lr"] == pytest.approx(0.001)
    assert told["steps"] == 2 * (2000 // 128)
    assert main([*command, "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["epochs"], config["flip"], config["crop"]) == (2, True, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{data}"], "holds weights, not a network: give --arch file.py:fn"),
        (["--arch", "{arch}"], "--data is missing"),
        (["--arch", "{arch}", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["--arch", "{arch}", "--data", "{data}", "--lr", "fast"], "--lr"),
        (["--arch", "{arch}", "--data", "{data}", "--mean-norm"], "--mean-norm: goes with a conversion"),
        (["--arch", "{arch}", "--arch-arg", "bad", "--data", "{data}"], "--arch-arg bad"),
        (["--arch", "{arch}", "--data", "{data}", "--scratch"], "say what replaces them (--init paper)"),
        (["--arch", "{arch}", "--data", "{data}", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--arch", "{arch}", "--data", "{data}", "--train", "g"], "--train"),
        (["--arch", "{arch}", "--data", "{data}", "--to", "gpm"], "--to gpm: unknown parameterization"),
        (["--arch", "torch.nn:Flatten", "--data", "{data}"], "the file holds this layer, Flatten does not"),
        (["--arch", "{arch}", "--arch-arg", "num_classes=4", "--data", "{data}"], "is [10, 64] in the file"),
    ],
)
def test_what_cannot_work_is_told_in_one_line_before_anything_is_written(
    options: list[str],
    message: str,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [option.format(arch=ARCH, data=BUNDLED) for option in options]
    assert main(["finetune", str(converted), *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_from() -> None:
    with pytest.raises(ReparamError, match="give a checkpoint, or --scratch"):
        pipeline.finetune(None, ARCH, BUNDLED, "run", SHORT)
    with pytest.raises(ReparamError, match="--scratch: give the network with --arch"):
        pipeline.finetune(None, None, BUNDLED, "run", Recipe(scratch=True))


def test_networks_that_do_not_fit(net: str, tmp_path: Path) -> None:
    scratch = Recipe(scratch=True, steps=1)
    with pytest.raises(DataError, match="does not take inputs of 1x28x28"):
        pipeline.finetune(None, f"{net}:mlp", BUNDLED, tmp_path / "run", scratch)
    with pytest.raises(ArchitectureError, match="raised"):
        pipeline.finetune(None, f"{net}:net", BUNDLED, tmp_path / "run", scratch, arch_args={"width": "'x'"})
    assert not (tmp_path / "run").exists()


def test_divergence_is_a_failed_check_that_keeps_the_last_good_checkpoint(
    converted: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckFailedError, match=r"training diverged at step \d+: .*best\.safetensors, of step 0"
    ):
        pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", Recipe(lr=1e30))
    assert same(tmp_path / "run" / "best.safetensors", converted)


def test_curves_show_the_run(converted: Path, tmp_path: Path) -> None:
    run = pipeline.finetune(converted, ARCH, BUNDLED, tmp_path / "run", SHORT)
    assert run.curves is not None
    assert run.curves.read_bytes().startswith(b"\x89PNG")


def test_what_the_data_cannot_have_is_found_before_an_earlier_run_is_replaced(
    net: str, tmp_path: Path
) -> None:
    np.savetxt(tmp_path / "set.csv", np.random.default_rng(0).normal(size=(20, 3)), delimiter=",")
    run = RunFolder(tmp_path / "run")
    for recipe in (Recipe(scratch=True, steps=1), Recipe(scratch=True, steps=1, crop=4)):
        before = run.state.read_bytes() if run.state.exists() else b""
        if not recipe.crop:
            pipeline.finetune(None, f"{net}:mlp", tmp_path / "set.csv", run.path, recipe)
            continue
        with pytest.raises(DataError, match="are for images"):
            pipeline.finetune(None, f"{net}:mlp", tmp_path / "set.csv", run.path, recipe, force=True)
        assert run.state.read_bytes() == before
