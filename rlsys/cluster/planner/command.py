"""``rlsys plan``: what a run will need, take and cost. Nothing is started and no GPU is looked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlsys.config.errors import UserError

FITS, DOES_NOT_FIT = 0, 1


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command ``plan``; its handler returns 0: the run fits, 1: it does not."""
    parser = subparsers.add_parser(
        "plan",
        help="what a run will need, take and cost, before anything starts",
        description="From the configuration, a model's config.json and tables of hardware: memory by part, placement, "
        "time a step by phase, price of 1,000 steps, and what to change. Exit code 0: the run fits; 1: it does "
        "not, and what would fit is said; 2: bad input.",
    )
    parser.add_argument(
        "--shape", type=Path, metavar="FILE", help="a model's config.json; its weights need not be here"
    )
    parser.add_argument("--prompt-tokens", type=float, metavar="N", help="mean prompt (default: half of the longest)")
    parser.add_argument(
        "--response-tokens", type=float, metavar="N", help="mean response (default: half of the longest)"
    )
    parser.add_argument("--dollars-per-hour", type=float, metavar="D", help="of one node (default: the table's)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to this file")
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="+recipe=NAME cluster=… and what to change")
    parser.set_defaults(handler=handle)


def handle(arguments: argparse.Namespace) -> int:
    """Runs the command. Raises UserError for bad input."""
    if arguments.dollars_per_hour is not None and arguments.dollars_per_hour < 0:
        raise UserError("a price is not negative", where="--dollars-per-hour", fix="give dollars an hour of one node")
    out: Path | None = arguments.json
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder '{out.parent}'", where="--json", fix="make it first")
    from rich.console import Console

    from rlsys.cluster.planner import advice, drawing
    from rlsys.cluster.planner.plan import Question, plan_run, report
    from rlsys.cluster.planner.shape import read_shape, shape_of
    from rlsys.cluster.topology import expected
    from rlsys.config.compose import compose_run

    config = compose_run(arguments.overrides)
    shape = read_shape(arguments.shape) if arguments.shape else shape_of(config.model.path)
    asked = Question(
        config, shape, expected(config.cluster), arguments.prompt_tokens, arguments.response_tokens,
        arguments.dollars_per_hour,
    )  # fmt: skip
    plan = plan_run(asked)
    better = advice.faster(asked, plan) if plan.memory.fits else []
    rescue = None if plan.memory.fits else advice.fitting(asked, plan)
    drawing.show(Console(), plan, better, rescue)
    if out is not None:
        said = [{"overrides": a.text, "step_s": a.plan.step_s} for a in better]
        content = report(plan) | {"advice": said, "fits_with": rescue.text if rescue else None}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return FITS if plan.memory.fits else DOES_NOT_FIT
