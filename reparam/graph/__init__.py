"""Whole models: loading an architecture, and rules that rewrite it without changing what it computes."""

from __future__ import annotations

from reparam.graph.arch import load_architecture, load_into
from reparam.graph.converting import convert
from reparam.graph.folding import fold
from reparam.graph.inputs import InputSpec, parse_spec
from reparam.graph.outcome import Outcome
from reparam.graph.records import apply_records, records_of

__all__ = [
    "InputSpec",
    "Outcome",
    "apply_records",
    "convert",
    "fold",
    "load_architecture",
    "load_into",
    "parse_spec",
    "records_of",
]
