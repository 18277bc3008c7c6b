"""What a rule did, or why it did not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One rule at one layer.

    Attributes:
        rule: name of the rule, "fold batch norm".
        layer: name of the layer as in ``named_modules``.
        applied: whether it was applied.
        why: what was done ("bn1 folded in, a bias gained"), or the reason it was refused.
    """

    rule: str
    layer: str
    applied: bool
    why: str
