"""Whether the deployed file computes what the original computed."""

from __future__ import annotations

from reparam.verification.compare import compare_onnx
from reparam.verification.report import Check, Report, VerificationError

__all__ = ["Check", "Report", "VerificationError", "compare_onnx"]
