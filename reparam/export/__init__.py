"""Writing ONNX."""

from __future__ import annotations

from reparam.export.onnx import export_onnx_model

__all__ = ["export_onnx_model"]
