"""``rlsys reward check``: try a reward function on responses in a file, without a run."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlsys.config.errors import UserError
from rlsys.config.schema import RewardConfig
from rlsys.rewards.base import Failure, RewardFunction, hooks_of
from rlsys.rewards.budget import reason
from rlsys.rewards.compose import Part, ScoredSample, load_function
from rlsys.rewards.pool import RewardPool

_WORST = 3
_BINS = 10
_BAR = 30


@dataclass(frozen=True)
class Row:
    """One row of the file. ``task`` is all of it but the response."""

    line: int
    response: str
    task: dict[str, Any]


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command ``check``; its handler returns 0: all rows scored, 1: some failed."""
    parser = subparsers.add_parser(
        "check",
        help="score the responses in a file",
        description="Scores rows {prompt, response, answer} of a JSONL file as a run would: in worker processes, with "
        "a time limit each. Exit code 0: all were scored; 1: for some the reward failed; 2: bad input.",
    )
    parser.add_argument("name", metavar="NAME", help="a reward, or the import path of your own (my_rewards.brevity)")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="F.jsonl", help="rows {prompt, response, answer, …}"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file")
    parser.add_argument(
        "--arg", action="append", default=[], metavar="KEY=VALUE", help="an option of the reward; VALUE is JSON or text"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes (default: 1)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=RewardConfig.timeout_s,
        metavar="S",
        help="seconds for a row (default: %(default)s)",
    )
    parser.set_defaults(handler=handle)


def handle(arguments: argparse.Namespace) -> int:
    """Runs the command. Raises UserError for bad input."""
    for name in ("limit", "workers", "timeout"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"{value} is not positive", where=f"--{name}", fix="give a positive number")
    out: Path | None = arguments.json
    if out is not None and not out.parent.is_dir():
        raise UserError(f"there is no folder '{out.parent}'", where="--json", fix="make it first")
    name, args = arguments.name, parse_arguments(arguments.arg)
    function, path = _load(name, args)
    rows = list(read_rows(arguments.data, needs=hooks_of(function).needs, limit=arguments.limit))
    if not rows:
        raise UserError("the file has no rows", where=str(arguments.data), fix="give rows {prompt, response, answer}")
    part = Part(name, path, function, args, 1.0, None)
    with RewardPool([part], workers=arguments.workers, timeout_s=arguments.timeout) as pool:
        scored = pool.score([(row.response, row.task) for row in rows])
    report = summarise(name, rows, scored)
    if out is not None:
        out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    show(Console(), report, rows, [sample.failure for sample in scored])
    return 1 if report["failures"] else 0


def _load(name: str, args: dict[str, Any]) -> tuple[RewardFunction, str]:
    try:
        return load_function(name, args, where="NAME", where_args="--arg")
    except UserError as error:  # its key --arg.mode is written --arg mode here
        where, fix = ((text or "").replace("--arg.", "--arg ") or None for text in (error.where, error.fix))
        raise UserError(error.what, where=where, fix=fix) from None


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value is JSON where it reads as JSON, else text. Raises UserError without a ``=``."""
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"'{pair}' is not KEY=VALUE", where="--arg", fix="write --arg mode=strict")
        try:
            arguments[key] = json.loads(text)
        except json.JSONDecodeError:
            arguments[key] = text
    return arguments


def read_rows(path: Path, *, needs: Sequence[str] = (), limit: int | None = None) -> Iterator[Row]:
    """The rows of a JSONL file; empty lines are skipped.

    Args:
        needs: fields that every row must have besides ``response``.
        limit: stop after so many rows.

    Raises:
        UserError: the file cannot be read, or a row is malformed, with file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=str(path), fix="check the path") from None
    count = 0
    for number, line in enumerate(lines, 1):
        if limit is not None and count >= limit:
            return
        if line.strip():
            count += 1
            yield _row(line, number, f"{path}:{number}", needs)


def _row(line: bytes, number: int, where: str, needs: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"the line is not JSON: {error}", where=where, fix="one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"the row is {type(row).__name__}, not an object", where=where, fix="one JSON object a line")
    for name in ("response", *needs):
        if row.get(name) is None:
            fix = f"every row needs {', '.join(('response', *needs))}"
            raise UserError(f"the row has no '{name}'", where=where, fix=fix)
    if not isinstance(row["response"], str):
        raise UserError(f"'response' is {type(row['response']).__name__}, not text", where=where, fix="quote it")
    if not isinstance(row.get("prompt", ""), str | list):
        raise UserError(f"'prompt' is {type(row['prompt']).__name__}, not text", where=where, fix="quote it")
    return Row(number, row["response"], {key: value for key, value in row.items() if key != "response"})


def summarise(name: str, rows: Sequence[Row], scored: Sequence[ScoredSample]) -> dict[str, Any]:
    """The report that ``--json`` writes.

    ``mean`` is over the rows that have a score (None without any); ``row`` counts from 0, ``line`` is the file's,
    from 1.
    """
    results = [
        {
            "row": position,
            "line": row.line,
            "score": None if sample.failure else sample.reward,
            "feedback": sample.feedback,
            "error": sample.failure and f"{sample.failure.kind}: {sample.failure.message}",
        }
        for position, (row, sample) in enumerate(zip(rows, scored, strict=True))
    ]
    scores = [sample.reward for sample in scored if sample.failure is None]
    return {
        "name": name,
        "rows": len(rows),
        "mean": statistics.fmean(scores) if scores else None,
        "failures": len(rows) - len(scores),
        "results": results,
    }


def show(console: Console, report: dict[str, Any], rows: Sequence[Row], failures: Sequence[Failure | None]) -> None:
    """Prints the report: mean, distribution, failures, and the worst-scored responses."""
    scores = [result["score"] for result in report["results"] if result["score"] is not None]
    mean = "–" if report["mean"] is None else f"{report['mean']:.4f}"
    console.print(
        f"[bold]{escape(report['name'])}[/]: {report['rows']} rows, mean {mean}, {report['failures']} failures",
        highlight=False,
    )
    if scores:
        table = Table("score", "rows", "", title="distribution", title_justify="left")
        for label, count in distribution(scores):
            table.add_row(label, str(count), "█" * max(1, round(_BAR * count / len(scores))) if count else "")
        console.print(table)
    failed = [(row, failure) for row, failure in zip(rows, failures, strict=True) if failure is not None]
    if failed:
        kinds = Counter(failure.kind for _, failure in failed)
        title = "failures: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        table = Table("line", "kind", "reason", "response", title=title, title_justify="left")
        for row, failure in failed[:_WORST]:
            table.add_row(str(row.line), failure.kind, *_cells(reason(failure), row.response))
        console.print(table)
        console.print(f"line {failed[0][0].line}: {failed[0][1].message}", markup=False, highlight=False)
    if scores and min(scores) < max(scores):
        worst = sorted((r for r in report["results"] if r["score"] is not None), key=lambda r: r["score"])[:_WORST]
        table = Table("line", "score", "answer", "response", "feedback", title="worst", title_justify="left")
        for result in worst:
            row = rows[result["row"]]
            cells = _cells(row.task.get("answer", ""), row.response, result["feedback"] or "")
            table.add_row(str(result["line"]), f"{result['score']:g}", *cells)
        console.print(table)


def _cells(*texts: Any) -> list[str]:
    """Texts as table cells: the end of long ones, which is where answers and errors are; markup is not interpreted."""
    return [escape(text if len(text) <= 160 else "…" + text[-160:]) for text in map(str, texts)]


def distribution(scores: Sequence[float]) -> list[tuple[str, int]]:
    """Counts by value where there are few values, else in bins of equal width."""
    counts = Counter(scores)
    if len(counts) <= _BINS:
        return [(f"{value:g}", counts[value]) for value in sorted(counts)]
    low, high = min(scores), max(scores)
    width = (high - low) / _BINS
    bins = Counter(min(_BINS - 1, int((score - low) / width)) for score in scores)
    return [(f"{low + i * width:.3g} … {low + (i + 1) * width:.3g}", bins[i]) for i in range(_BINS)]
