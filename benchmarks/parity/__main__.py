"""Every estimator, loss, aggregation, KL, correction and divergence against an independent implementation.

    python -m benchmarks.parity [--quick] [--seeds 50] [--json PATH] [--out docs/results]

Writes ``parity.md`` into ``--out`` and the worst error by name as JSON. Exit code 1 where one is above the limit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import pkgutil
import platform
import sys
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import benchmarks.parity
from benchmarks.parity.case import Case, errors

LIMIT = 1e-5  # of the absolute and of the relative error, in float32
ORACLES = ("verl", "trl", "torch")

Row = tuple[str, str, str, float, float]


def cases() -> dict[str, list[Case]]:
    """By area (name of the module)."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.parity.__path__):
        listed = getattr(importlib.import_module(f"benchmarks.parity.{module.name}"), "CASES", None)
        if listed:
            found[module.name] = listed
    return found


def measure(seeds: int, console: Console) -> list[Row]:
    """(area, name, oracle, worst absolute, worst relative error) of every case."""
    everything = [(area, case) for area, listed in cases().items() for case in listed]
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("parity", total=len(everything))
        for area, case in everything:
            progress.update(task, advance=1, description=case.name)
            worst = [errors(case, seed) for seed in range(seeds)]
            rows.append((area, case.name, case.oracle, max(a for a, _ in worst), max(r for _, r in worst)))
    return rows


def report(rows: list[Row], seeds: int) -> str:
    """The page."""
    lines = ["| what | against | worst absolute error | worst relative error |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {oracle} | {absolute:.1e} | {relative:.1e} |" for _, name, oracle, absolute, relative in rows
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ORACLES)
    table = "\n".join(lines)
    return f"""# Parity with independent implementations

Each line compares a function of rlsys in float32, values and gradients, with the same quantity of another
implementation over {seeds} random ragged inputs. The relative error of an element is over the larger of its own size
and 1 % of its tensor's largest. The limit for both errors is {LIMIT:g}. Where implementations disagree each convention
has its line.

{table}

Worst of all: {max(row[3] for row in rows):.1e} absolute, {max(row[4] for row in rows):.1e} relative.

Measured on {date.today().isoformat()} with `python -m benchmarks.parity --seeds {seeds}`: {platform.machine()}, no GPU,
Python {platform.python_version()}, {versions}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="3 seeds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the Markdown page")
    arguments = parser.parse_args()
    seeds = 3 if arguments.quick else arguments.seeds
    torch.set_num_threads(1)
    console = Console(stderr=True)
    rows = measure(seeds, console)
    above = [name for _, name, _, absolute, relative in rows if max(absolute, relative) > LIMIT]
    sys.stdout.write(report(rows, seeds))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "parity.md").write_text(report(rows, seeds), encoding="utf-8")
    if arguments.json:
        figures = {name: {"absolute": absolute, "relative": relative} for _, name, _, absolute, relative in rows}
        text = json.dumps({"limit": LIMIT, "seeds": seeds, "worst": figures}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    for name in above:
        console.print(f"above the limit: {name}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
