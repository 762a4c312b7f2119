"""Every estimator, loss, aggregation, KL, correction and divergence against an independent implementation.

    python -m benchmarks.parity [--quick] [--seeds 50] [--json PATH] [--out docs/results]

Writes ``parity.md`` into ``--out`` and the worst error by name as JSON. Exit code 1 where one is above the limit.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import torch
from rich.console import Console
from rich.progress import Progress

import benchmarks.parity
from benchmarks import report
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


def page(rows: list[Row], seeds: int) -> str:
    """The page."""
    header = ("what", "against", "worst absolute error", "worst relative error")
    table = report.table(
        header, ((name, oracle, f"{absolute:.1e}", f"{relative:.1e}") for _, name, oracle, absolute, relative in rows)
    )
    return f"""# Parity with independent implementations

Each line compares a function of rlsys in float32, values and gradients, with the same quantity of another
implementation over {seeds} random ragged inputs. The relative error of an element is over the larger of its own size
and 1 % of its tensor's largest. The limit for both errors is {LIMIT:g}. Where implementations disagree each convention
has its line.

{table}

Worst of all: {max(row[3] for row in rows):.1e} absolute, {max(row[4] for row in rows):.1e} relative.

{report.measured(f"benchmarks.parity --seeds {seeds}", *ORACLES)}
"""


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    arguments = parser.parse_args()
    seeds = 3 if arguments.quick else arguments.seeds
    torch.set_num_threads(1)
    console = Console(stderr=True)
    rows = measure(seeds, console)
    above = [name for _, name, _, absolute, relative in rows if max(absolute, relative) > LIMIT]
    errors_by_name = {name: {"absolute": absolute, "relative": relative} for _, name, _, absolute, relative in rows}
    ratios = {"worst error / limit": max(max(row[3:]) for row in rows) / LIMIT}
    figures = {"limit": LIMIT, "seeds": seeds, "ratios": ratios, "worst": errors_by_name}
    report.finish(arguments, "parity", page=page(rows, seeds), figures=figures, packages=ORACLES)
    for name in above:
        console.print(f"above the limit: {name}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
