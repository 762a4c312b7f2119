"""GRPO steps per second: a whole rlsys run (Ray, actors, controller) against TRL's GRPOTrainer.

    python -m benchmarks.grpo_step [--model 3M 26M] [--workload …] [--windows 5] [--steps 3] [--sampler torch]
                                   [--threads N] [--quick] [--json PATH] [--out docs/results]

Same model (Qwen3 shape, random weights, 512 words about equally likely), prompts, temperature 1, AdamW, loss (token
mean of the clipped surrogate, advantages over the group's standard deviation, one update a step, no KL). Lengths with
a long tail: 16 of the 512 words end a response, so lengths are geometric with mean 32, cut at 128. Or all of 64.

Each side is a process that trains a window of steps, waits while the other trains its own, and so on: start-up and
the first window do not count, and whatever else the machine does meets both. A ratio is the median over windows.

TRL first tries its samplers (``generate`` and continuous batching of transformers) and sizes of the micro-batch, three
steps each, and goes on with the fastest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report
from benchmarks.grpo_step_sides import Task, Workload, make_folder, run_rlsys, run_trl

MODELS = {"3M": (256, 4, 768), "26M": (512, 8, 1536)}  # hidden, layers, intermediate
WORKLOADS = {
    "8 × 8, long tail": Workload(8, 128, stops=True),
    "32 × 8, long tail": Workload(32, 128, stops=True),
    "8 × 8, equal": Workload(8, 64, stops=False),
}
LIMITS = {"8 × 8, long tail": 2.0, "32 × 8, long tail": 3.0, "8 × 8, equal": 1.3}
_PATIENCE_S = 600.0  # for one window, or a start


class Side:
    """A process that trains when told to."""

    def __init__(self, run: Callable[[Task, Connection], None], task: Task):
        task.work.mkdir()
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=run, args=(task, theirs))
        self._process.start()
        theirs.close()
        self._receive()  # it is ready for its first step

    def steps(self, number: int) -> tuple[float, float]:
        """Trains; returns the seconds that a step took, by the clock and of CPU time over all its processes."""
        before = self._cpu_s()
        self._connection.send(number)
        seconds = float(self._receive())
        return seconds / number, (self._cpu_s() - before) / number

    def finish(self) -> dict[str, float]:
        """Ends the process; returns what it measured itself."""
        self._connection.send(0)
        found: dict[str, float] = self._receive()
        self._process.join(_PATIENCE_S)
        return found

    def _cpu_s(self) -> float:
        total, own = 0.0, psutil.Process(self._process.pid)
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        if not self._connection.poll(_PATIENCE_S):
            raise TimeoutError("a side of the benchmark did not answer")
        return self._connection.recv()  # EOFError: it died; its own words are on standard error


@dataclass(frozen=True)
class Result:
    """timings, cpu: seconds a step by side and window, by the clock and of CPU time; found: what each side measured
    itself; tried: seconds a step of TRL by sampler and rows of a micro-batch, the one that was taken first."""

    timings: report.Timings
    cpu: report.Timings
    found: dict[str, dict[str, float]]
    tried: dict[tuple[str, int], float]

    @property
    def ratio(self) -> float:
        return self.timings.ratio("TRL", "rlsys")


MICRO_BATCHES = (16, 64, 256)  # rows that TRL trains on at once


def settings_of_trl(model: Path, load: Workload, arguments: Any, work: Path) -> dict[tuple[str, int], float]:
    """Seconds of TRL's second and third step by its sampler and rows of a micro-batch, the fastest first."""
    found: dict[tuple[str, int], float] = {}

    def attempt(sampler: str, rows: int) -> None:
        task = Task(load, model, work / f"try-{sampler}-{rows}", arguments.threads, sampler, rows)
        side: Side | None = None
        try:
            side = Side(run_trl, task)
            side.steps(1)
            found[sampler, rows] = side.steps(2)[0]
        except (EOFError, TimeoutError):
            print(f"TRL does not run with {sampler} here")
        finally:
            if side is not None:
                side.kill()

    sizes = [rows for rows in MICRO_BATCHES if rows <= load.prompts * load.samples]
    for rows in sizes[:1] if arguments.quick else sizes:
        attempt("generate", rows)
    if not arguments.quick:
        attempt("continuous", min(found, key=lambda key: found[key])[1])
    return dict(sorted(found.items(), key=lambda item: item[1]))


def compare(model: Path, load: Workload, arguments: Any, work: Path) -> Result:
    tried = settings_of_trl(model, load, arguments, work)
    sampler, rows = next(iter(tried))
    tasks = {
        "TRL": (run_trl, Task(load, model, work / "trl", arguments.threads, sampler, rows)),
        "rlsys": (run_rlsys, Task(load, model, work / "rlsys", arguments.threads, arguments.sampler)),
    }
    sides: dict[str, Side] = {}
    try:
        for name, (run, task) in tasks.items():
            sides[name] = Side(run, task)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for window in range(1 + arguments.windows):
            for name in list(sides)[:: -1 if window % 2 else 1]:
                taken = sides[name].steps(arguments.steps)
                if window:
                    seconds[name].append(taken[0])
                    cpu[name].append(taken[1])
        found = {name: side.finish() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.kill()
    return Result(report.Timings(seconds), report.Timings(cpu), found, tried)


PHASES = ("prompts", "rollout", "reward", "load", "old_logprobs", "update", "sync")


def phases(result: Result) -> list[str]:
    """Milliseconds of each phase of an rlsys step: medians over steps; the driver's own work is the rest."""
    found = result.found["rlsys"]
    known = [1000 * found.get(f"time/{name}_s", 0.0) for name in PHASES]
    rest = 1000 * found["time/step_s"] - sum(known)
    trl, sampled = 1000 * result.timings.median("TRL"), 1000 * result.found["TRL"]["time/rollout_s"]
    return [*(f"{ms:.0f}" for ms in (*known, rest)), f"{sampled:.0f}", f"{trl - sampled:.0f}"]


def page(results: dict[tuple[str, str], Result], arguments: Any) -> str:
    speeds = report.table(
        ["model", "prompts × samples", "rlsys steps/s", "TRL steps/s", "ratio", "windows", "aim", "ratio of CPU time",
         "mean length, rlsys", "mean length, TRL"],
        [
            (
                model, load, f"{1 / r.timings.median('rlsys'):.2f}", f"{1 / r.timings.median('TRL'):.2f}",
                f"**{r.ratio:.2f} ×**", _spread(r), f"≥ {LIMITS[load]} ×", f"{r.cpu.ratio('TRL', 'rlsys'):.2f} ×",
                f"{r.found['rlsys']['rollout/length_mean']:.1f}", f"{r.found['TRL']['length']:.1f}",
            )
            for (model, load), r in results.items()
        ],
    )  # fmt: skip
    parts = report.table(
        ["model", "prompts × samples", *PHASES, "controller", "TRL: rollout + reward", "TRL: update"],
        [(model, load, *phases(r)) for (model, load), r in results.items()],
    )
    tries = report.table(
        ["model", "prompts × samples", "sampler, rows of a micro-batch: seconds a step"],
        [
            (model, load, "; ".join(f"{name}, {rows}: {seconds:.2f}" for (name, rows), seconds in r.tried.items()))
            for (model, load), r in results.items()
        ],
    )
    command = f"benchmarks.grpo_step --windows {arguments.windows} --steps {arguments.steps}"
    where = report.measured(command, "trl", "transformers", "vllm", "ray")
    return f"""# grpo_step: a training step against TRL's GRPOTrainer

{(__doc__ or "").split("    python")[0].strip()}

{speeds}

Windows: lowest and highest ratio of {arguments.windows} windows of {arguments.steps} steps a side. CPU time: over all
processes of a side, Ray's own too; on a machine with other work it is steadier than the clock. Both sides have
{arguments.threads} threads. Sampler of rlsys: `rollout={arguments.sampler}`. TRL: no gradient checkpointing, float32,
fused AdamW; its trainer is not distributed. Its sampler and micro-batch are the fastest of these (`generate`, and
transformers' continuous batching):

{tries}

## Where the time goes

Milliseconds a step, medians.

{parts}

{where}
"""


def _spread(result: Result) -> str:
    pairs = zip(result.timings.seconds["TRL"], result.timings.seconds["rlsys"], strict=True)
    ratios = [a / b for a, b in pairs]
    return f"{min(ratios):.2f} – {max(ratios):.2f}"


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="a window")
    parser.add_argument("--sampler", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--threads", type=int, default=report.cores(), help="of each side")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.windows, arguments.steps, arguments.model = 1, 1, arguments.model[:1]
    results: dict[tuple[str, str], Result] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.model:
            hidden, layers, intermediate = MODELS[name]
            folder = Path(root) / name
            make_folder(folder, hidden=hidden, layers=layers, intermediate=intermediate)
            for load in arguments.workload:
                work = Path(root) / f"{name}-{list(WORKLOADS).index(load)}"
                work.mkdir()
                results[name, load] = compare(folder, WORKLOADS[load], arguments, work)
    figures = {
        "ratios": {f"{model}, {load}": r.ratio for (model, load), r in results.items()},
        "limits": {f"{model}, {load}": LIMITS[load] for model, load in results},
        "seconds": {f"{model}, {load}": r.timings.seconds for (model, load), r in results.items()},
        "cpu_ratios": {f"{model}, {load}": r.cpu.ratio("TRL", "rlsys") for (model, load), r in results.items()},
        "TRL": {
            f"{model}, {load}": {f"{n}, {rows}": s for (n, rows), s in r.tried.items()}
            for (model, load), r in results.items()
        },
        "found": {f"{model}, {load}": r.found for (model, load), r in results.items()},
    }
    report.finish(
        arguments, "grpo_step", page=page(results, arguments), figures=figures, packages=["trl", "transformers", "ray"]
    )


if __name__ == "__main__":
    main()
