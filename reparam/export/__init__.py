"""Writing ONNX."""

from __future__ import annotations

from reparam.export.onnx import Exported, export_onnx_model

__all__ = ["Exported", "export_onnx_model"]
