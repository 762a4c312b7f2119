"""``rlsys ledger RUN``: what became of every prompt group of a run, as a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.tracking.ledger import Audit, Kind, State, audit

_SHOWN = 20  # violations a table lists


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command ``ledger``."""
    parser = subparsers.add_parser(
        "ledger",
        help="what became of every prompt that a run handed out",
        description="Follows a run's ledger along the lineage of checkpoints that survived, and looks for samples that "
        "were trained twice or lost, and for groups that were torn apart. Exit code 0: none; 1: some; 2: bad input.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a ledger.jsonl")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=handle)


def handle(arguments: argparse.Namespace) -> int:
    """``rlsys ledger``: 0 where all invariants hold, else 1.

    Raises:
        UserError: there is no ledger, or it is damaged.
    """
    found = audit(arguments.run)
    if arguments.json:
        sys.stdout.write(json.dumps(as_dict(found), indent=2, ensure_ascii=False) + "\n")
    else:
        Console().print(*tables(found), sep="\n")
    return 0 if found.ok else 1


def as_dict(found: Audit) -> dict[str, Any]:
    """As JSON content."""
    return {
        "ok": found.ok,
        "groups": {state.value: number for state, number in found.groups.items()},
        "samples": {state.value: number for state, number in found.samples.items()},
        "distinct_samples_trained": len(found.trained_ids),
        "outstanding_groups": found.outstanding,
        "violations": {kind.value: found.count(kind) for kind in Kind},
        "violation_texts": [violation.text for violation in found.violations],
        "reissues": found.reissues,
        "late_answers": found.late,
        "resumes": found.resumes,
        "voided_samples": found.voided,
        "torn": found.torn,
    }


def tables(found: Audit) -> list[Table | Text]:
    """For a terminal: states, counts, and what is wrong."""
    states = Table("state", "groups", "samples")
    for state in State:
        states.add_row(state.value, f"{found.groups[state]:,}", f"{found.samples[state]:,}")
    counts = Table("count", "")
    counts.add_row("distinct samples trained", f"{len(found.trained_ids):,}")
    counts.add_row("attempts given up and handed out again", f"{found.reissues:,}")
    counts.add_row("answers that came too late", f"{found.late:,}")
    counts.add_row("resumes", f"{found.resumes:,}")
    counts.add_row("samples trained on lineages that were given up", f"{found.voided:,}")
    for kind in Kind:
        number = found.count(kind)
        counts.add_row(kind.value, Text(f"{number:,}", style="bold red" if number else "green"))
    parts: list[Table | Text] = [states, counts]
    parts += [Text(violation.text, style="red") for violation in found.violations[:_SHOWN]]
    if len(found.violations) > _SHOWN:
        parts.append(Text(f"and {len(found.violations) - _SHOWN:,} more (--json has all)", style="red"))
    if found.torn:
        parts.append(Text("The last line is torn: its writer is at work, or was killed.", style="yellow"))
    return parts
