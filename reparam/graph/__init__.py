"""Whole models: loading an architecture, and rules that rewrite its layers."""

from __future__ import annotations

from reparam.graph.arch import load_architecture, load_into
from reparam.graph.folding import fold
from reparam.graph.inputs import InputSpec, parse_spec
from reparam.graph.swap import apply_records

__all__ = ["InputSpec", "apply_records", "fold", "load_architecture", "load_into", "parse_spec"]
