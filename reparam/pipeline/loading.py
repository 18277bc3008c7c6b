"""A checkpoint in its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.checkpoint import LayerRecord, dialects, open_checkpoint
from reparam.checkpoint.states import names_in_layers, state_dict_of
from reparam.errors import ArchitectureError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from reparam.checkpoint import Checkpoint


@dataclass(frozen=True)
class Network:
    """A network filled with a checkpoint's tensors, its layers held as the checkpoint holds them.

    Attributes:
        model: as its constructor leaves it, in training mode.
        checkpoint: where its values come from.
        dtypes: of the checkpoint's tensors, by the model's keys.
        notes: what the user should know.
    """

    model: nn.Module
    checkpoint: Checkpoint
    dtypes: dict[str, torch.dtype]
    notes: tuple[str, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """The model's, every tensor in the dtype the checkpoint has it in, tied ones still tied."""
        cast: dict[tuple[int, torch.dtype], Tensor] = {}
        found = {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            dtype = self.dtypes.get(key, value.dtype)
            found[key] = cast.setdefault((id(value), dtype), value.detach().to(dtype))
        return found


def load_network(
    path: Path, arch: str | None, arch_args: Mapping[str, str] | None, *, as_held: bool = False
) -> Network:
    """Load a checkpoint into the network it belongs to.

    Args:
        path: a checkpoint in any parameterization.
        arch, arch_args: as :func:`reparam.graph.load_architecture` takes them; None for a Hugging Face folder, whose
            config.json says it.
        as_held: in the dtypes of the file, else in those the architecture is built in.

    Raises:
        ReparamError: one of the two cannot be had, or they do not fit.
    """
    from reparam.graph import apply_records, load_architecture, load_into
    from reparam.graph.arch import hold_as, wrapper_prefix
    from reparam.graph.huggingface import load_huggingface, own_names

    checkpoint = open_checkpoint(path)
    if arch is not None:
        plain = load_architecture(arch, arch_args)
    else:
        require_description(checkpoint)
        assert checkpoint.folder is not None
        plain = load_huggingface(checkpoint.folder, checkpoint.config)
    tensors, records, notes = state_dict_of(checkpoint), checkpoint.records, checkpoint.notes
    if arch is not None:
        prefix = wrapper_prefix(tensors, plain.state_dict())
        names = {key: key.removeprefix(prefix) for key in (*tensors, *records)}
        told = f"`{prefix}` stands before every name in the file, not in {type(plain).__name__}: left out"
    else:
        names = own_names(plain, {*tensors, *records}, legacy=not records)
        changed = [f"{key} is {names[key]}" for key in tensors if names[key] != key]
        told = f"{len(changed)} names are others in this release of transformers: {''.join(changed[:1])}"
    if any(key != name for key, name in names.items()):
        notes += (told,)
        tensors = {names[key]: tensor for key, tensor in tensors.items()}
        records = {names[key]: _renamed(record, names, key) for key, record in records.items()}
    records = {**records, **_unrecorded(plain, tensors, records)}
    names = names_in_layers(tensors, records)
    tensors = {names.get(key, key): tensor for key, tensor in tensors.items()}
    if as_held:
        hold_as(plain, tensors, records)
    model = apply_records(plain, records)
    load_into(model, tensors, str(path))
    return Network(model, checkpoint, {key: tensor.dtype for key, tensor in tensors.items()}, notes)


def _renamed(record: LayerRecord, names: Mapping[str, str], key: str) -> LayerRecord:
    """The record of the layer ``key`` with its batch norms, which no tensor names, renamed as the layer is."""
    if record.batch_norm is None or not key.endswith(names[key]):
        return record
    prefix = key.removesuffix(names[key])
    first, *more = (norm.removeprefix(prefix) for norm in record.batch_norms)
    return replace(record, batch_norm=first, more_batch_norms=tuple(more))


def _unrecorded(
    plain: nn.Module, tensors: Mapping[str, Tensor], records: Mapping[str, LayerRecord]
) -> dict[str, LayerRecord]:
    """Records of the weight normalization that torch wrote, of layers that are plain in the architecture.

    One whose norms do not run over all axes but the first has none: there is no layer for it.
    """
    from reparam.dtypes import code_of
    from reparam.layers import layer_class
    from reparam.layers.kinds import kind_of, weight_names
    from reparam.parameterizations import WeightSpec

    modules = dict(plain.named_modules(remove_duplicate=False))
    found = {}
    for key, (_, g, v) in dialects.weight_norm_keys(tensors).items():
        name, parameter = dialects.split(key)
        module, shape = modules.get(name), tuple(tensors[v].shape)
        by_row = tuple(tensors[g].shape) == (*shape[:1], *(1,) * (len(shape) - 1))
        if key in records or module is None or not by_row or parameter not in weight_names(module):
            continue
        kind, bias = kind_of(module), tensors.get(dialects.bias_key(key))
        if kind is None or layer_class("wn", type(module)) is None:
            continue
        spec = WeightSpec(
            shape,
            code_of(tensors[v].dtype),
            kind.unit(module),
            None if bias is None else tuple(bias.shape),
            None if bias is None else code_of(bias.dtype),
            "F64" if code_of(tensors[g].dtype) == "F64" else "F32",
        )
        found[key] = LayerRecord("wn", spec, None if bias is None else "bias")
    return found


def require_description(checkpoint: Checkpoint, *others: str) -> None:
    """Raise ArchitectureError where nothing says what network a checkpoint belongs to.

    Args:
        checkpoint: of which it is asked.
        others: options of the command that say it too.
    """
    if not describes_network(checkpoint):
        ways = ", ".join(["--arch file.py:fn", *others])
        plain = "; for plain weights only: reparam convert … --to sp" if others else ""
        raise ArchitectureError(
            f"`{checkpoint.path.name}` holds weights, not a network: give {ways} or a folder with config.json{plain}"
        )


def describes_network(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a Hugging Face folder, whose config.json says what network it belongs to."""
    return checkpoint.folder is not None and bool({"architectures", "model_type"} & checkpoint.config.keys())
