"""Checkpoints on disk: reading, planning, streaming write, key dialects. Knows tensors, not modules."""

from __future__ import annotations

from reparam.checkpoint.converting import Progress, convert_checkpoint
from reparam.checkpoint.inspecting import Inspection, inspect_checkpoint
from reparam.checkpoint.metadata import LayerRecord
from reparam.checkpoint.reading import Checkpoint, open_checkpoint
from reparam.checkpoint.report import ConversionReport, LayerReport
from reparam.checkpoint.selection import Selection
from reparam.checkpoint.states import load_state_dict, save_state_dict

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "Inspection",
    "LayerRecord",
    "LayerReport",
    "Progress",
    "Selection",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_state_dict",
    "open_checkpoint",
    "save_state_dict",
]
