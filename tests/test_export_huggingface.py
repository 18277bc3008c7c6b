"""Hugging Face folders, without `--arch`: random small models, plain and in GmP, exported by the command and proven.

Their weights are as transformers draws them: biases of zeros and norms of ones are equal, of which exporters keep one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support import convert, done, run
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

WORDS, PLACES = 40, 128
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
#: float32, of the output's scale: what ONNX Runtime and torch may differ by
NEAR = 3e-6


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        build: it.
        inputs: SPECs.
        sizes: extents of dynamic axes that no sample of the verification has.
        outputs: the names of the file's outputs.
    """

    build: Callable[[], nn.Module]
    inputs: list[str]
    sizes: dict[str, int]
    outputs: list[str]
    axes: list[list[int | str]] = field(default_factory=list)


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=PLACES, **SIZES))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))


def gpt2() -> nn.Module:
    """As its config.json is by default: it keeps what it computed for the next token, which is no output here."""
    config = GPT2Config(vocab_size=WORDS, n_positions=PLACES, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)  # fmt: skip
    assert config.use_cache
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, max_position_embeddings=PLACES, num_key_value_heads=1, **SIZES)
    )


IDS, MASK = "input_ids=int64[N,T]", "attention_mask=int64[N,T]"
CASES = {
    "bert": Case(
        bert, [IDS, MASK, "token_type_ids=int64[N,T]"], {"N": 3, "T": 11}, ["last_hidden_state", "pooler_output"],
        [["N", "T", 16], ["N", 16]],
    ),
    "vit": Case(vit, ["pixel_values=float32[N,3,8,8]"], {"N": 5}, ["logits"], [["N", 3]]),
    "gpt2": Case(gpt2, [IDS], {"N": 3, "T": 11}, ["logits"], [["N", "T", WORDS]]),
    "llama": Case(llama, [IDS, MASK], {"N": 3, "T": 11}, ["logits"], [["N", "T", WORDS]]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module]]:
    """The folder of a model, and the model."""
    made: dict[str, tuple[Path, nn.Module]] = {}

    def folder(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            torch.manual_seed(0)
            model = CASES[name].build().eval()
            path = tmp_path_factory.mktemp("models") / name
            model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return folder


def drawn(case: Case) -> dict[str, Tensor]:
    """Inputs of sizes of their own: padded sentences, images."""
    generator = torch.Generator().manual_seed(3)
    rows, length = case.sizes["N"], case.sizes.get("T", 0)
    ids = torch.randint(WORDS, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[1, length // 2 :] = 0
    every = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": ids % 2,
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
    }
    return {name: every[name] for name in (text.partition("=")[0] for text in case.inputs)}


@pytest.mark.parametrize(("name", "form"), [("bert", "gmp"), ("vit", "gmp"), ("gpt2", "gmp"), ("llama", "sp")])  # fmt: skip
def test_a_folder_exports_without_arch(
    name: str, form: str, folders: Callable[[str], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    """All proofs hold, axes stay dynamic, outputs have the model's names; on other sizes it computes the same."""
    case, (folder, model) = CASES[name], folders(name)
    if form != "sp":
        convert(folder, form, tmp_path / "converted")
        folder = tmp_path / "converted"
    options = [x for text in case.inputs for x in ("--input", text)]
    report = done("export", folder, "--onnx", tmp_path / "m.onnx", *options, "--json").json
    assert report["proofs"] == {"weights": True, "algebra": True, "deployment": True}
    proto = onnx.load(tmp_path / "m.onnx")
    assert [value.name for value in proto.graph.output] == case.outputs
    axes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.output]
    assert axes == case.axes
    inputs = drawn(case)
    with torch.no_grad():
        expected = model.double()(
            **{k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
        )
    model.float()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {key: x.numpy() for key, x in inputs.items()})
    for value, wanted in zip(found, (expected[key].numpy() for key in case.outputs), strict=True):
        assert np.abs(value - wanted).max() <= NEAR * np.abs(wanted).max()


def test_a_file_of_other_weights_is_told_from_it(
    folders: Callable[[str], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    """The command's verdict on one embedding changed in one place, and on outputs in another order."""
    folder, _ = folders("bert")
    options = [x for text in CASES["bert"].inputs for x in ("--input", text)]
    done("export", folder, "--onnx", tmp_path / "m.onnx", *options)
    proto = onnx.load(tmp_path / "m.onnx")
    table = next(t for t in proto.graph.initializer if t.name == "embeddings.position_embeddings.weight")
    values = onnx.numpy_helper.to_array(table).copy()
    values[3, 5] += 0.5
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(proto, tmp_path / "w.onnx")
    ran = run("verify", folder, tmp_path / "w.onnx", *options, "--json")
    assert ran.code == 1
    assert ran.json["diverges"] == "embeddings.position_embeddings.weight"
    assert ran.json["proofs"] == {"weights": False, "algebra": True, "deployment": False}
    swapped = onnx.load(tmp_path / "m.onnx")
    outputs = list(swapped.graph.output)
    del swapped.graph.output[:]
    swapped.graph.output.extend(reversed(outputs))
    onnx.save(swapped, tmp_path / "s.onnx")
    ran = run("verify", folder, tmp_path / "s.onnx", *options, "--json")
    assert ran.code == 1
    failed = [check for check in ran.json["checks"] if not check["passed"]]
    assert any(check["name"] == "outputs" and "pooler_output" in check["where"] for check in failed)
