"""What every benchmark shares: two sides timed in alternation, the machine in words, Markdown tables, pages and JSON.

arguments = parser(__doc__).parse_args()
timed = alternate({"rlsys": ours, "peer": theirs}, rounds=5)
figures = {"ratios": {"concat": timed.ratio("peer", "rlsys")}, "limits": {"concat": 3.0}}
finish(arguments, "batch", page=page, figures=figures, packages=["verl"])
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Timings:
    """seconds: name of a side → what each of its rounds took, in the order of the rounds."""

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times longer ``slow`` takes than ``fast``: the median over rounds of the two times of one round,
        which the machine's other work disturbs less than the ratio of two medians."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Times the sides in turn, so that whatever else the machine does meets all of them. Every other round goes through
    them backwards.

    Args:
        warmup: rounds that do not count. repeats: calls a measurement; its time is that of one.
        clock: in seconds; ``time.process_time`` counts this process's CPU alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            call = sides[name]
            began = clock()
            for _ in range(repeats):
                call()
            if number >= warmup:
                seconds[name].append((clock() - began) / repeats)
    return Timings(seconds)


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def peak_rss() -> int:
    """Bytes: the largest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- words about where it was measured


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return " ".join(value.split())
    return platform.machine()


def machine() -> str:
    """``AMD EPYC (x86_64), 2 cores, 23 GiB of memory, no GPU``"""
    memory = psutil.virtual_memory().total / GIB
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = f"{count} × {torch.cuda.get_device_name(0)}" if count else "no GPU"
    return f"{cpu_model()} ({platform.machine()}), {cores()} cores, {memory:.0f} GiB of memory, {gpus}"


def versions(*packages: str) -> dict[str, str]:
    """Python's, rlsys's, torch's and those of further packages; one that is not installed is left out."""
    found = {"Python": platform.python_version()}
    for name in ("rlsys", "torch", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measured(command: str, *packages: str, note: str = "") -> str:
    """The last paragraph of a page: when, with which command, where, with which versions.

    Args:
        command: module and arguments (``benchmarks.batch --rounds 9``).
        packages: whose versions matter here.
        note: a sentence more.
    """
    used = ", ".join(f"{name} {version}" for name, version in versions(*packages).items())
    text = f"Measured on {date.today().isoformat()} with `python -m {command}` on {machine()}. {used}. {note}"
    return _wrapped(text.strip())


def _wrapped(text: str, width: int = 118) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


# --- what is written


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are shown as ``str`` shows them."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark; each adds its own.

    Args:
        description: the module's docstring.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small and short: does it run at all")
    made.add_argument("--json", type=Path, metavar="PATH", help="all figures")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the Markdown page (docs/results)")
    return made


def finish(
    arguments: argparse.Namespace, name: str, *, page: str, figures: Mapping[str, Any], packages: Sequence[str] = ()
) -> None:
    """Prints the page; writes ``NAME.md`` into ``--out`` and the figures, with machine and versions, into ``--json``.

    Args:
        figures: JSON content. ``ratios``: numbers by name, what the benchmark is about.
        packages: whose versions matter.
    """
    sys.stdout.write(page.rstrip() + "\n")
    if arguments.out:
        write_page(arguments.out, name, page)
    if arguments.json:
        where = {"machine": machine(), "versions": versions(*packages), "date": date.today().isoformat()}
        write_json(arguments.json, where | dict(figures))


def write_page(folder: Path, name: str, page: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text(page.rstrip() + "\n", encoding="utf-8")
    return path


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
