"""Hugging Face folders: the network from config.json, tiny random models, in float64 where outputs are compared."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import done, raw_tensors, records_of, refused, tensors_of
from test_huggingface import CASES, EXACT, original, outputs, worst
from torch import nn

from reparam.checkpoint import load_state_dict
from reparam.errors import ArchitectureError
from reparam.graph.huggingface import own_names
from reparam.pipeline.loading import load_network

#: by the layers there are, counted by hand: two blocks of q, k, v, out and the MLP; BERT's dense layer before the head; the
#: convolution that cuts ViT's patches
LAYERS = {"bert": 2 * 6 + 1, "gpt2": 2 * 4, "llama": 2 * 7, "vit": 2 * 6 + 1}
INSIDE = ("--scale", "inside")


def saved(name: str, folder: Path, **options: object) -> nn.Module:
    model = original(name)
    model.save_pretrained(folder, **options)
    return model


def loaded(folder: Path) -> nn.Module:
    return load_network(folder, None, None, as_held=True).model.eval()


@pytest.mark.parametrize("name", LAYERS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / name)
    expected = outputs(model, name)
    report = done("convert", tmp_path / name, "--to", "gmp", *INSIDE, "--json").json
    made = tmp_path / f"{name}-gmp"
    assert report["output"] == str(made)
    assert [layer["status"] for layer in report["layers"]].count("converted") == LAYERS[name]
    assert all(layer["reason"] for layer in report["layers"])
    assert sorted(f.name for f in made.iterdir()) == sorted(f.name for f in (tmp_path / name).iterdir())
    assert (made / "config.json").read_bytes() == (tmp_path / name / "config.json").read_bytes()
    found = loaded(made)
    assert type(found) is type(model)
    assert worst(outputs(found, name), expected) <= EXACT
    head = found.get_output_embeddings()
    assert (head is not None and head.weight is found.get_input_embeddings().weight) == CASES[name].tied
    # back: tensors alone, and read by transformers itself
    done("convert", made, "--to", "sp", "-o", tmp_path / "back")
    again, how = type(model).from_pretrained(
        tmp_path / "back", dtype=torch.float64, local_files_only=True, output_loading_info=True
    )
    assert not how["missing_keys"]
    assert not how["unexpected_keys"]
    assert worst(outputs(again.eval(), name), expected) <= EXACT


def test_shards_become_one_file_and_keep_their_types(tmp_path: Path) -> None:
    original("llama").bfloat16().save_pretrained(tmp_path / "llama", max_shard_size="5KB")
    before = load_state_dict(tmp_path / "llama")[0]
    report = done("convert", tmp_path / "llama", "--to", "wn", "--mean-norm", "--json").json
    assert any("shards become one model.safetensors" in note for note in report["notes"])
    made = tmp_path / "llama-wn"
    assert [f.name for f in made.glob("model*")] == ["model.safetensors"]
    found = tensors_of(made / "model.safetensors")
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"])
    assert records_of(made / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]["mean"] == "mbn"
    refused("convert", tmp_path / "llama", "--to", "wn", "--mean-norm", naming=("llama-wn", "--force"))
    done("convert", tmp_path / "llama", "--to", "wn", "--mean-norm", "--force")
    # the index itself names the same model
    index = tmp_path / "llama" / "model.safetensors.index.json"
    done("convert", index, "--to", "gmp", *INSIDE, "-o", tmp_path / "by-index")
    assert (tmp_path / "by-index" / "config.json").exists()


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "gpt2")
    assert "lm_head.weight" not in raw_tensors(tmp_path / "gpt2" / "model.safetensors")
    done("convert", tmp_path / "gpt2", "--to", "gmp", *INSIDE)
    made = raw_tensors(tmp_path / "gpt2-gmp" / "model.safetensors")
    assert [key for key in made if made[key][1] == made["transformer.wte.weight"][1]] == [
        "transformer.wte.weight"
    ]


def test_names_of_older_releases(tmp_path: Path) -> None:
    """transformers itself renames them on reading: our renaming finds every name of the model, and says so."""
    model = saved("vit", tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    if set(tensors_of(file)) == set(model.state_dict()):
        pytest.skip("this release of transformers writes the names it has")
    report = done("convert", tmp_path / "vit", "--to", "gmp", *INSIDE, "--json").json
    assert any("names are others in this release of transformers" in note for note in report["notes"])
    bert = original("bert")
    keys = [key.replace("LayerNorm.weight", "LayerNorm.gamma") for key in bert.state_dict()]
    assert list(own_names(bert, keys).values()) == list(bert.state_dict())
    # weight normalization is not renamed where records tell what it is
    assert own_names(bert, ["x.weight_g"], legacy=False) == {"x.weight_g": "x.weight_g"}
    with pytest.raises(ArchitectureError, match="are both"):
        own_names(bert, [keys[0], *(k for k in keys if "gamma" in k), *bert.state_dict()])


def test_export_needs_no_arch(tmp_path: Path) -> None:
    original("vit").float().save_pretrained(tmp_path / "vit")
    done("convert", tmp_path / "vit", "--to", "gmp", *INSIDE)
    spec = "pixel_values=float32[N,3,8,8]"
    ran = done("export", tmp_path / "vit-gmp", "--input", spec, "--onnx", tmp_path / "vit.onnx", "--json")
    assert ran.json["passed"] is True


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


CONFIGS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "code of its own": ({"auto_map": {"AutoModel": "modeling.Bert"}}, ("auto_map", "never run", "--arch")),
    "no architecture": ({"architectures": None}, ("config.json", "names no architecture", "--arch")),
    "an empty list": ({"architectures": []}, ("names no architecture",)),
    "an unknown one": ({"architectures": ["Nothing"]}, ("transformers", "no Nothing", "--arch")),
    "something else": ({"architectures": ["AutoConfig"]}, ("no AutoConfig",)),
    "an unknown type": ({"model_type": "nothing"}, ("BertForMaskedLM cannot be built",)),
    "another size": ({"hidden_size": 32}, ("does not fit BertForMaskedLM", "[40, 16] in the file")),
    "more layers": ({"num_hidden_layers": 3}, ("missing from the file", "bert.encoder.layer.2")),
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "bert"
    saved("bert", folder)
    return folder


@pytest.mark.parametrize(("values", "names"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_do_not_work(
    values: dict[str, object], names: tuple[str, ...], bert: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert, tmp_path / "in" / "bert")
    change_config(folder, **values)
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused("convert", folder, "--to", "gmp", *INSIDE, naming=names, leaving=tmp_path)


def test_without_transformers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(
        "convert", bert, "--to", "gmp", *INSIDE, naming=("pip install 'transformers",), leaving=bert.parent
    )
    # tensors alone need neither
    done("convert", bert, "--to", "gmp", "--dry-run")


def test_rules_say_what_takes_a_graph(bert: Path) -> None:
    report = done("convert", bert, "--to", "gmp", "--scale", "outside", "--dry-run", "--json").json
    (whole,) = [rule for rule in report["rules"] if rule["layer"] == ""]
    assert "cannot trace BertForMaskedLM" in whole["why"]
    assert not [rule for rule in report["rules"] if rule["rule"] == "place scale" and rule["applied"]]
    assert report["rewritten"] is False
    refused("convert", bert, "--to", "unit", naming=("unit", "cannot trace"), leaving=bert.parent)


def test_a_file_in_such_a_folder_is_a_file(bert: Path, tmp_path: Path) -> None:
    refused("convert", bert / "model.safetensors", "--to", "gmp", "--fold-bn", naming=("--fold-bn", "--arch"))
    save_file({"fc.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    refused("convert", tmp_path, "--to", "gmp", "--mean-norm", naming=("--mean-norm", "config.json"))


@pytest.mark.parametrize("options", [(), ("--scale", "outside")], ids=["tensors alone", "the network"])
def test_what_people_are_told(options: tuple[str, ...], bert: Path, tmp_path: Path) -> None:
    """How to get back, and what takes a graph: each once, in words."""
    made = tmp_path / "bert-gmp"
    out = done("convert", bert, "--to", "gmp", *options, "-o", made).out
    (line,) = [line for line in out.splitlines() if "from_pretrained does not read this folder" in line]
    assert line.endswith(f"reparam convert {made} --to sp")
    assert "from_pretrained" not in done("convert", made, "--to", "sp", "-o", tmp_path / "back").out
    traced = [line for line in out.splitlines() if "cannot trace" in line]
    assert traced == (
        [
            "torch.fx cannot trace BertForMaskedLM, as is usual for models of transformers: rules that need the graph are "
            "not possible, layers are converted one by one and chosen by their names"
        ]
        if options
        else []
    )
    assert ("it takes the network's graph: see below" in out) == bool(options)
