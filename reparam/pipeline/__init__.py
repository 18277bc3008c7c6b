"""The stages, one after the other. They do not know one another; these modules do."""

from __future__ import annotations

from reparam.pipeline.converting import convert_model
from reparam.pipeline.exporting import export_onnx
from reparam.pipeline.finetuning import FinetuneRun, Setup, finetune, run_finetune, set_up
from reparam.pipeline.proven import OnnxExport
from reparam.pipeline.report import ModelReport
from reparam.pipeline.verifying import verify

__all__ = [
    "FinetuneRun",
    "ModelReport",
    "OnnxExport",
    "Setup",
    "convert_model",
    "export_onnx",
    "finetune",
    "run_finetune",
    "set_up",
    "verify",
]
