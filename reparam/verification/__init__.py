"""Whether the deployed file computes what the original computed."""

from __future__ import annotations

from reparam.verification.checkpoints import verify_checkpoints
from reparam.verification.deployment import compare_onnx
from reparam.verification.pools import Tolerance
from reparam.verification.report import Check, Report, VerificationError
from reparam.verification.samples import load_data
from reparam.verification.verifying import verify_models, verify_onnx

__all__ = [
    "Check",
    "Report",
    "Tolerance",
    "VerificationError",
    "compare_onnx",
    "load_data",
    "verify_checkpoints",
    "verify_models",
    "verify_onnx",
]
