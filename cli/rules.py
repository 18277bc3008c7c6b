"""How the rules of a whole-model conversion look on a terminal: what was done to which layers, alike ones as one line."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from . import text

if TYPE_CHECKING:
    from reparam.graph import Outcome
    from reparam.pipeline import ModelReport

# Names of layers that a line shows.
_NAMED, _WIDTH = 3, 60
# Characters of a reason where no terminal wraps it; --json has all of it.
_REASON = 110


def print_rules(report: ModelReport) -> None:
    """Print a table with a line for every rule and reason."""
    did, done = ("would apply", "would be done") if report.dry_run else ("applied", "was done")
    # Of the network as a whole; one that another says in full is not said twice.
    whole = dict.fromkeys(outcome.why for outcome in report.rules if not outcome.layer)
    whole_reasons = [
        why for why in whole if not any(other != why and other.startswith(why) for other in whole)
    ]
    groups: dict[tuple[str, bool, str], list[Outcome]] = {}
    for outcome in report.rules:
        if not outcome.layer:
            continue
        # Reasons that differ in the names of layers alone are one reason.
        pattern = re.sub(r"`[^`]*`", "`…`", outcome.why)
        groups.setdefault((outcome.rule, outcome.applied, pattern), []).append(outcome)
    order = list(dict.fromkeys(rule for rule, _, _ in groups))
    rows = []
    for (rule, applied, _), members in sorted(
        groups.items(), key=lambda group: (order.index(group[0][0]), not group[0][1])
    ):
        names = [outcome.layer for outcome in members]
        why = members[0].why + ", and so on" * (len({outcome.why for outcome in members}) > 1)
        if any(reason.startswith(members[0].why) for reason in whole_reasons):
            why = "it takes the network's graph: see below"
        which = text.fitting(names, _WIDTH, _NAMED)
        rows.append([rule, did if applied else "refused", str(len(names)), which, _short(why)])
    text.table(["rule", "", "layers", "which", f"what {done}, or why not"], rows)
    for reason in whole_reasons:
        print(reason)


def _short(why: str) -> str:
    return why if len(why) <= _REASON or sys.stdout.isatty() else why[: _REASON - 1] + "…"


def print_others(report: ModelReport) -> None:
    """Print what became of the tensors that are no layer's."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in report.others.items():
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        copied = "would copy" if report.dry_run else "copied"
        print(f"{copied}: {text.count(len(keys), 'tensor')} ({text.shorten(keys, _NAMED)}): {reason}")
