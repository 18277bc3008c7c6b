"""The network of a Hugging Face folder, from its config.json: the class it names, of transformers' own.

    {"architectures": ["BertForMaskedLM"], ...}   →   transformers.BertForMaskedLM(config)

Code that lies in the folder, or that it points to, is never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.errors import ArchitectureError
from reparam.graph.arch import told


def load_huggingface(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Build the network that a folder's config.json describes; its weights are random, tied ones tied.

    Args:
        folder: with the config.json.
        config: what it says.

    Raises:
        ArchitectureError: transformers is missing, does not have the class, or cannot build it; or the model is code
            of its own.
    """
    where = folder / "config.json"
    if "auto_map" in config:
        raise ArchitectureError(
            f"{where}: its network is code of its own (auto_map), which is never run: name the network with --arch"
        )
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ArchitectureError(f"{where}: names no architecture: give the network with --arch")
    try:
        import transformers
    except ImportError:
        raise ArchitectureError(
            f"{where}: building {names[0]} takes transformers: pip install 'transformers>=4.56', or give --arch"
        ) from None
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ArchitectureError(
            f"{where}: transformers {transformers.__version__} has no {names[0]}: name the network with --arch"
        )
    try:
        # The caller's random numbers are not disturbed.
        with torch.random.fork_rng(devices=[]):
            made = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model = cls(made)
    except Exception as error:  # whatever transformers meets in a config
        raise ArchitectureError(f"{where}: {names[0]} cannot be built: {told(error)}") from error
    assert isinstance(model, nn.Module)
    for module in model.modules():
        settings = getattr(module, "config", None)
        # What a decoder keeps for its next token is none of its outputs here.
        if settings is not None and getattr(settings, "use_cache", False):
            settings.use_cache = False
    model.tie_weights()
    return model


def own_names(model: nn.Module, keys: Iterable[str], legacy: bool = True) -> dict[str, str]:
    """What the keys of a file are called in a model of transformers: newer releases rename modules of older ones.

    Args:
        model: of :func:`load_huggingface`.
        keys: of the file, tensors in any parameterization.
        legacy: rename gamma and beta too, and torch's weight_g and weight_v.

    Raises:
        ArchitectureError: two keys would get one name.
    """
    keys = list(keys)
    network: Any = model
    own: Any = network.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a release that renames nothing
        return {key: key for key in keys}
    transforms = get_model_conversion_mapping(network, add_legacy=legacy)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    names = {
        key: key if key in own else rename_source_key(key, renamings, [], network.base_model_prefix, own)[0]
        for key in keys
    }
    first: dict[str, str] = {}
    for key, name in names.items():
        if first.setdefault(name, key) != key:
            raise ArchitectureError(
                f"`{first[name]}` and `{key}` are both `{name}` in {type(model).__name__}"
            )
    return names
