"""Several runs side by side: a table for the terminal and for Markdown, a picture, and ``sweep.json``; from their
folders and what is known of how they ended.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlsys.checkpoint.atomic import write_json, writing
from rlsys.config.errors import UserError
from rlsys.tracking.blocks import duration
from rlsys.tracking.metrics import Line, read_metrics
from rlsys.tracking.plots import plot_comparison

SCHEMA_VERSION = 1
_REDRAW_S = 2.0
_COLUMNS = ("job", "what differs", "ended", "held-out, %", "best, %", "reward", "steps", "time")
_SYMBOLS = {"finished": "green", "failed": "bold red", "stopped": "yellow", "running": "cyan", "waiting": "dim"}


@dataclass(frozen=True)
class Result:
    """How a run of a sweep went. overrides: its command line; status: ``waiting``, ``running``, ``finished``,
    ``failed``, ``stopped``; folder: in which it made its run folder; job: the cluster's name of it; steps: that it was
    to do."""

    number: int
    overrides: tuple[str, ...]
    status: str
    folder: Path
    exit_code: int | None = None
    error: str = ""
    seconds: float = 0.0
    job: str | None = None
    steps: int = 0


def run_folder_of(folder: Path) -> Path | None:
    """The newest run folder in ``folder``; None: the run did not come so far, or this machine does not see it."""
    return max((path.parent for path in folder.glob("*/config.yaml")), default=None)


def varying(overrides: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Of each command line, the words that not all have."""
    shared = set.intersection(*(set(words) for words in overrides)) if overrides else set()
    if len(overrides) == 1:
        shared = set()
    return [tuple(word for word in words if word not in shared) for words in overrides]


def read_curves(folder: Path) -> list[Line]:
    """The steps of the run in ``folder``, as far as it has come; none where there is no run folder."""
    made = run_folder_of(folder)
    if made is None or not (made / "metrics.jsonl").is_file():
        return []
    try:
        return read_metrics(made / "metrics.jsonl")
    except UserError:  # being written, or damaged: the other runs are compared all the same
        return []


def figures(steps: Sequence[Line]) -> dict[str, Any]:
    """``initial``, ``final`` and ``best`` held-out accuracy, the last ``reward``, and ``steps`` done; null where there
    is no such figure."""
    accuracy = [line["eval/accuracy"] for line in steps if math.isfinite(line.get("eval/accuracy", math.nan))]
    rewards = [line["reward/mean"] for line in steps if math.isfinite(line.get("reward/mean", math.nan))]
    return {
        "initial": accuracy[0] if accuracy else None,
        "final": accuracy[-1] if accuracy else None,
        "best": max(accuracy, default=None),
        "reward": rewards[-1] if rewards else None,
        "steps": max((line["step"] for line in steps), default=0),
    }


def objective(result: Result) -> float | None:
    """Held-out accuracy at the end of a run that finished: what a search goes by."""
    if result.status != "finished":
        return None
    final = figures(read_curves(result.folder))["final"]
    return None if final is None else float(final)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What ``sweep.json`` says of each run."""
    differing = varying([result.overrides for result in results])
    found = []
    for result, words in zip(results, differing, strict=True):
        made = run_folder_of(result.folder)
        found.append(
            {
                "job": result.number,
                "differs": list(words),
                "overrides": list(result.overrides),
                "status": result.status,
                "exit_code": result.exit_code,
                "error": result.error or None,
                "seconds": result.seconds,
                "run_folder": str(made) if made else None,
                "ray_job": result.job,
                "steps_planned": result.steps,
                **figures(read_curves(result.folder)),
            }
        )
    return found


def cells(row: Mapping[str, Any], top: float | None) -> list[str]:
    """One line of the table. top: the best final accuracy of all, which is marked."""
    initial, final = row["initial"], row["final"]
    accuracy = "–" if final is None else f"{100 * initial:.1f} → {100 * final:.1f}"
    if final is not None and row["status"] == "finished" and final == top:
        accuracy += " ★"
    status = row["status"]
    if row["exit_code"]:
        status += f" ({row['exit_code']})"
    return [
        str(row["job"]),
        text_of(row["differs"]),
        status,
        accuracy,
        "–" if row["best"] is None else f"{100 * row['best']:.1f}",
        "–" if row["reward"] is None else f"{row['reward']:.3f}",
        f"{row['steps']}/{row['steps_planned']}",
        duration(row["seconds"]) if row["seconds"] else "–",
    ]


def text_of(words: Sequence[str]) -> str:
    """Overrides as a reader wants them, without Hydra's quoting; – for none."""
    return " ".join(word.replace("\\", "") for word in words) or "–"


def short(words: Sequence[str]) -> str:
    """The same without the groups that keys lie in, and with four digits of long numbers."""
    pairs = (word.partition("=") for word in words)
    return text_of([f"{key.rpartition('.')[2].lstrip('+~')}{equals}{_rounded(value)}" for key, equals, value in pairs])


def _rounded(value: str) -> str:
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d+\.\d{5,}(e-?\d+)?", value) else value


def best_of(found: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest final accuracy of a run that finished."""
    finished = [row["final"] for row in found if row["status"] == "finished"]
    return max((final for final in finished if final is not None), default=None)


def terminal_table(found: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for name in _COLUMNS:
        folds = name == _COLUMNS[1]
        table.add_column(name, justify="left" if name in _COLUMNS[1:3] else "right", no_wrap=not folds, overflow="fold")
    top = best_of(found)
    for row in found:
        words = [Text(cell) for cell in cells(row, top)]
        words[1] = Text(short(row["differs"]))
        words[2].stylize(_SYMBOLS.get(row["status"], ""))
        if row["final"] is not None and row["final"] == top:
            words[3].stylize("bold")
        table.add_row(*words)
    return table


def markdown(found: Sequence[Mapping[str, Any]], title: str, picture: str | None = None) -> str:
    """The page of a sweep: the table, why runs failed, and the curves.

    Args:
        picture: path of the PNG, from the page.
    """

    def line(words: Sequence[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"

    top = best_of(found)
    text = [f"# {title}", "", line(_COLUMNS), line(["---:", "---", "---", *["---:"] * 5])]
    for row in found:
        words = cells(row, top)
        text.append(line([words[0], f"`{words[1]}`", *words[2:]]))
    failed = [row for row in found if row["error"]]
    if failed:
        text += ["", "## What failed", ""]
        for row in failed:
            reason = " ".join(str(row["error"]).split())
            text.append(f"- job {row['job']} (`{text_of(row['differs'])}`), {row['status']}: {reason}")
    if picture:
        text += ["", f"![Curves of every run]({picture})"]
    return "\n".join(text) + "\n"


def write_comparison(folder: Path, results: Sequence[Result], title: str) -> list[dict[str, Any]]:
    """Writes ``sweep.json``, ``sweep.md`` and, where there is something to draw, ``sweep.png`` into ``folder``.

    Returns:
        The rows.

    Raises:
        UserError: the files cannot be written.
    """
    found = rows(results)
    curves = {label(row): read_curves(result.folder) for row, result in zip(found, results, strict=True)}
    drawn = {name: steps for name, steps in curves.items() if steps}
    picture = plot_comparison(drawn, folder / "sweep.png", title) if drawn else None
    write_json(folder / "sweep.json", {"schema_version": SCHEMA_VERSION, "title": title, "jobs": found})
    with writing("the table", folder / "sweep.md"):
        (folder / "sweep.md").write_text(markdown(found, title, picture.name if picture else None), encoding="utf-8")
    return found


def label(row: Mapping[str, Any]) -> str:
    """Of a run's curve."""
    return f"{row['job']}: {short(row['differs'])}"


class SweepDisplay:
    """What a person sees of a sweep: the table as it fills, live on a terminal; elsewhere a line when a job begins or
    ends. Use it as a context manager around each batch of jobs."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._told: dict[int, str] = {}
        self._drawn = 0.0

    def __enter__(self) -> SweepDisplay:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, results: Sequence[Result]) -> None:
        """Shows how far the jobs are."""
        changed = {r.number: r.status for r in results if self._told.get(r.number, "waiting") != r.status}
        self._told |= changed
        if self._live is None:
            for row in rows(results) if changed else []:
                if row["job"] in changed:
                    self.note(_sentence(row))
        elif changed or time.monotonic() - self._drawn > _REDRAW_S:
            self._drawn = time.monotonic()
            self._live.update(terminal_table(rows(results)), refresh=True)

    def finish(self, found: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """The table, why jobs failed, and where everything lies."""
        self._console.print(terminal_table(found))
        for row in found:
            if row["error"]:
                self.note(f"job {row['job']} {row['status']}: {' '.join(str(row['error']).split())}")
        self.note(f"table and curves: {folder / 'sweep.md'}")


def _sentence(row: Mapping[str, Any]) -> str:
    what = f"job {row['job']} ({text_of(row['differs'])})"
    if row["status"] == "running":
        return f"{what} began"
    accuracy = "" if row["final"] is None else f", held-out {100 * row['final']:.1f} %"
    return f"{what} {row['status']} in {duration(row['seconds'])}{accuracy}"


def read_comparison(folder: Path) -> list[dict[str, Any]]:
    """The rows that :func:`write_comparison` wrote."""
    content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return list(content["jobs"])
