"""The stages, one after the other. They do not know one another; these modules do."""

from __future__ import annotations

from reparam.pipeline.converting import convert_model
from reparam.pipeline.report import ModelReport
from reparam.pipeline.stages import FinetuneRun, OnnxExport, export_onnx, finetune
from reparam.pipeline.verifying import verify

__all__ = ["FinetuneRun", "ModelReport", "OnnxExport", "convert_model", "export_onnx", "finetune", "verify"]
