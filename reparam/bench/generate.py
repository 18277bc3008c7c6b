"""A checkpoint of a chosen size that looks like a language model's: shards, an index, config.json, a tied head."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from reparam.checkpoint.writing import SafetensorsWriter
from reparam.dtypes import bits, torch_dtype

_HIDDEN, _INNER, _VOCABULARY = 2048, 5632, 32000


def _layer(i: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.self_attn.{name}_proj.weight": (_HIDDEN, _HIDDEN) for name in ("q", "k", "v", "o")
    }
    shapes |= {f"{at}.self_attn.{name}_proj.bias": (_HIDDEN,) for name in ("q", "k", "v")}
    shapes |= {f"{at}.mlp.{name}_proj.weight": (_INNER, _HIDDEN) for name in ("gate", "up")}
    shapes[f"{at}.mlp.down_proj.weight"] = (_HIDDEN, _INNER)
    shapes |= {f"{at}.{name}_layernorm.weight": (_HIDDEN,) for name in ("input", "post_attention")}
    return shapes


def generate(folder: Path, gigabytes: float, dtype: str = "BF16", shards: int = 4, seed: int = 0) -> Path:
    """Write a sharded checkpoint of seeded Gaussian weights into a new folder.

    Args:
        folder: to make.
        gigabytes: of tensors, at least; whole layers are added until they are reached.
        dtype: safetensors code of a floating type.
        shards: how many files.
        seed: of the weights.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    layers = 0
    while layers < shards or sum(_numel(s) for s in shapes.values()) * bits(dtype) / 8 < gigabytes * 1e9:
        shapes |= _layer(layers)
        layers += 1
    shapes["model.norm.weight"] = (_HIDDEN,)
    keys = list(shapes)
    parts = [keys[i * len(keys) // shards : (i + 1) * len(keys) // shards] for i in range(shards)]
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(part, name)
        with SafetensorsWriter(
            folder / name, {k: (dtype, shapes[k]) for k in part}, {"format": "pt"}
        ) as writer:
            for key in part:
                value = torch.randn(shapes[key], generator=generator)
                writer.write(
                    key, (value * 0.02 if value.dim() > 1 else 1 + value * 0.02).to(torch_dtype(dtype))
                )
    total = sum(_numel(shape) for shape in shapes.values()) * bits(dtype) // 8
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "qwen2",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": layers,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
