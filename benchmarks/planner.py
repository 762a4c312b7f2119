"""The planner against whole runs: calibrated on three configurations, judged on five others.

    python -m benchmarks.planner [--measured PATH] [--seconds S] [--calibrate] [--quick] [--json PATH]
                                 [--out docs/results]

Each configuration is a run of the command line (Ray, actors, controller, ``rollout=torch``): a Qwen3 shape with random
weights, responses that are all as long or end at random (geometric, mean 32, cut). Seconds are medians over steps after
the first; memory is the peak of a process, less what the same process needs for a model of next to nothing.

What was measured is kept in ``--measured`` and not measured again, so that a long series can be cut into several of
``--seconds``. With ``--calibrate`` the coefficients that were found are written into the planner's own file.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import report
from benchmarks.grpo_step_sides import Task, Workload, make_folder, rlsys_overrides
from benchmarks.planner_cases import CALIBRATED, JUDGED, QUICK, Case
from benchmarks.planner_published import published
from rlsys.cluster.planner import calibration
from rlsys.cluster.planner.calibration import Calibration, Coefficients
from rlsys.cluster.planner.fitting import fit_memory, fit_rates
from rlsys.cluster.planner.plan import Question, RunPlan, plan_run
from rlsys.cluster.planner.shape import read_shape
from rlsys.cluster.topology import expected
from rlsys.config.compose import compose_run
from rlsys.engines.flops import matmul_peak
from rlsys.tracking.metrics import read_metrics

MEMORY_BAR, TIME_BAR = 0.15, 0.30
_MIB = 2**20
_KEPT = ("time/", "memory/", "rollout/", "train/", "throughput/")
_PROMPT = 12.0  # mean of benchmarks.grpo_step_sides
_ROOT = Path(__file__).parents[1]


def task_of(case: Case, work: Path, threads: int) -> Task:
    workload = Workload(case.prompts, case.limit, case.stops, case.samples)
    return Task(workload, work / "model", work / "runs", threads, "torch")


def settle(seconds: float = 150.0, busy: float = 25.0) -> None:
    """Waits until the machine has had nothing to do for some seconds, or as long as this."""
    quiet, until = 0, time.monotonic() + seconds
    while quiet < 3 and time.monotonic() < until:
        quiet = quiet + 1 if psutil.cpu_percent(interval=1.0) < busy else 0


def measure(case: Case, threads: int) -> dict[str, float]:
    """Medians of a run's metrics, and the largest of its peaks."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "runs").mkdir()
        make_folder(work / "model", hidden=case.hidden, layers=case.layers, intermediate=case.intermediate)
        overrides = [
            *rlsys_overrides(task_of(case, work, threads))[:-2],
            f"steps={case.steps}",
            f"run_root={work}/runs",
        ]
        found = subprocess.run(
            [sys.executable, "-m", "rlsys.launch", *overrides],
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
            cwd=_ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if found.returncode:
            raise RuntimeError(f"{case.name}: {found.stderr[-2000:]}")
        (run,) = (work / "runs").glob("*-grpo_qwen")
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "reward/mean" in line][1:]
    names = [name for name in lines[-1] if name.startswith(_KEPT)]
    middle = {name: statistics.median(line[name] for line in lines if name in line) for name in names}
    peaks = {name: max(line[name] for line in lines if name in line) for name in names if name.startswith("memory/")}
    return middle | peaks


def measured_cases(arguments: Any, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """What ``--measured`` has, and as much more as there is time for."""
    path: Path | None = arguments.measured
    known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    began = time.monotonic()
    if "machine" not in known:
        settle()
        known["machine"] = rates(arguments.threads)
    for case in cases:
        if case.name not in known and time.monotonic() - began < arguments.seconds:
            settle()
            known[case.name] = measure(case, arguments.threads)
            if path is not None:
                path.write_text(json.dumps(known, indent=1), encoding="utf-8")
            took = known[case.name]["time/step_s"]
            print(f"{case.name}: a step took {took:.2f} s", file=sys.stderr)
    return known


def rates(threads: int) -> dict[str, float]:
    """FLOP/s of this many threads by dtype, and bytes a second that they copy (read and written)."""
    torch.set_num_threads(threads)
    source = torch.ones(64 * _MIB)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return {
        "float32": matmul_peak(torch.float32, seconds=1.0),
        "bfloat16": matmul_peak(torch.bfloat16, seconds=1.0),
        "bandwidth": 2 * source.nbytes / min(times),
    }


def question(case: Case, threads: int, known: Calibration) -> Question:
    """The same run, as the planner is asked about it."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shape = read_shape(case.write_config(work / "model"))
        config = compose_run(rlsys_overrides(task_of(case, work, threads)))
    mean = min(32.0, case.limit) if case.stops else float(case.limit)
    if case.stops:
        mean = case.mean
    return Question(config, shape, expected(config.cluster), _PROMPT, mean, calibration=known)


def resident(plan: RunPlan) -> dict[str, float]:
    """Bytes beyond the import baseline that the trainer's and the sampler's process have resident: shared memory counts
    in each of them."""
    (parts,) = plan.memory.phases.values()
    shared = parts["weights on their way to samplers"]
    sampler = sum(size for name, size in parts.items() if name.startswith("the sampler's"))
    own = parts["the processes' own"]
    return {"trainer": sum(parts.values()) - sampler - own, "sampler": sampler + shared}


def peaks(found: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """The same as measured. base: of the run with a model of next to nothing."""
    return {
        role: _peak(found, name) - _peak(base, name) for role, name in (("trainer", "trainer"), ("sampler", "rollout"))
    }


def _peak(found: Mapping[str, float], role: str) -> float:
    return max(size for name, size in found.items() if name.startswith(f"memory/{role}_") and name.endswith("_bytes"))


def calibrate(measured: Mapping[str, Mapping[str, float]], cases: Sequence[Case], threads: int) -> Coefficients:
    """Coefficients from the first cases; the first of all is the baseline."""
    known, machine = calibration.load("cpu"), measured["machine"]
    base = measured[cases[0].name]
    peak = max([machine["float32"], *(_own_peak(run) for name, run in measured.items() if name != "machine")])
    speed = {"float32": peak, "bfloat16": peak * machine["bfloat16"] / machine["float32"]}
    start = replace(
        known.coefficients,
        peak_gflops={name: flops / threads / 1e9 for name, flops in speed.items()},
        bandwidth_gbs=machine["bandwidth"] / 1e9,
        baseline_mib=base["memory/pss_bytes"] / _MIB / 5,  # trainer, sampler, reward worker, its process, driver
    )
    asked = [question(case, threads, Calibration(start, "", True)) for case in cases]
    runs = [measured[case.name] for case in cases]
    start = fit_rates(start, [(q, dict(run)) for q, run in zip(asked, runs, strict=True)])
    sized = [(q, peaks(run, base)) for q, run in zip(asked[1:], runs[1:], strict=True)]
    return fit_memory(start, sized, resident)


def _own_peak(found: Mapping[str, float]) -> float:
    """FLOP/s of matrix products that a run's trainer measured at its start: the most that was seen is the least
    disturbed."""
    return found["throughput/model_flops_per_s"] / max(found["throughput/mfu"], 1e-6)


def errors(case: Case, found: Mapping[str, float], base: Mapping[str, float], plan: RunPlan) -> dict[str, Any]:
    """Measured and predicted, of one case."""
    there, said = peaks(found, base), resident(plan)
    both = (sum(there.values()), sum(said.values()))
    return {
        "parameters": plan.work.shape.parameters,
        "memory": both,
        "by_role": {role: (there[role], said[role]) for role in there},
        "step": (found["time/step_s"], plan.step_s),
        "phases": {
            name: (found[f"time/{name}_s"], plan.phases[name].seconds) for name in ("rollout", "update", "sync")
        },
        "memory_error": both[1] / both[0] - 1 if both[0] else None,  # of the baseline itself
        "step_error": plan.step_s / found["time/step_s"] - 1,
    }


def rows(figures: Mapping[str, dict[str, Any]], cases: Sequence[Case]) -> list[list[str]]:
    result = []
    for case in cases:
        one = figures[case.name]
        (had, said), (took, thought) = one["memory"], one["step"]
        result.append([
            case.name, case.words, f"{had / _MIB:.0f}", f"{said / _MIB:.0f}", _share(one["memory_error"], MEMORY_BAR),
            f"{took:.2f}", f"{thought:.2f}", _share(one["step_error"], TIME_BAR),
        ])  # fmt: skip
    return result


def _share(error: float | None, bar: float) -> str:
    if error is None:
        return "baseline"
    text = f"{error:+.0%}"
    return text if abs(error) <= bar else f"**{text}**"


def page(figures: Mapping[str, dict[str, Any]], found: Coefficients, cases: Sequence[Sequence[Case]]) -> str:
    header = ["model", "prompts × samples, tokens", "MiB measured", "predicted", "", "step, s", "predicted", ""]
    judged = [figures[case.name] for case in cases[1]]
    worst = [max(abs(one[f"{kind}_error"]) for one in judged) for kind in ("memory", "step")]
    phases = report.table(
        [
            "model",
            *(f"{name}, s: measured, predicted" for name in ("rollout", "update", "sync")),
            "trainer, MiB",
            "sampler, MiB",
        ],
        [
            [case.name, *(f"{a:.3f}, {b:.3f}" for a, b in figures[case.name]["phases"].values())]
            + [f"{a / _MIB:.0f}, {b / _MIB:.0f}" for a, b in figures[case.name]["by_role"].values()]
            for case in (*cases[0], *cases[1])
        ],
    )
    return "\n\n".join(
        [
            "# planner: predicted against measured",
            "What `rlsys plan` says of a run, against the run itself (with Ray and `rollout=torch`, on a CPU).\n"
            "Its coefficients were fitted on three configurations; five others, which no fit has seen, judge them.",
            f"Bars: memory beyond the import baseline within {MEMORY_BAR:.0%}, a step's time within {TIME_BAR:.0%}.\n"
            f"The worst of the five: memory {worst[0]:.0%}, time {worst[1]:.0%}. Bold: missed.",
            "## Judged",
            report.table(header, rows(figures, cases[1])),
            "## Fitted on",
            report.table(header, rows(figures, cases[0])),
            "Memory is the peak of the trainer's and the sampler's process together, each less its peak with the\n"
            "first model (imports, Ray, process group): memory that both map counts in both.",
            "## By phase and process",
            phases,
            "Measured, predicted. A fraction of a peak is bounded by 1; that bound was added after a first look at\n"
            "these figures (a fit without it left the memory's bandwidth out of decoding: small models stay in the\n"
            "caches), and nothing else was. A run beside which other programs computed was measured again when the\n"
            "machine was idle, before anything was predicted. Lengths are drawn anew each step: the peak of memory is\n"
            "that of the longest.",
            "## Coefficients",
            report.table(["coefficient", "found"], [(n, _number(v)) for n, v in vars(found).items()]),
            published(),
            report.measured("benchmarks.planner --out docs/results", "transformers", "ray"),
        ]
    )  # fmt: skip


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:.0f}" for name, number in value.items())
    return f"{value:.4g}"


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--measured", type=Path, metavar="PATH", help="runs that were measured; more are added")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no further run after so long")
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--calibrate", action="store_true", help="write the coefficients into the planner's file")
    arguments = parser.parse_args()
    fitted, judged = (QUICK[:3], QUICK[3:]) if arguments.quick else (CALIBRATED, JUDGED)
    every = (*fitted, *judged)
    measured = measured_cases(arguments, every)
    if missing := [case.name for case in every if case.name not in measured]:
        print(f"not measured yet: {', '.join(missing)}")
        return
    found = calibrate(measured, fitted, arguments.threads)
    source = f"measured on {report.machine()}"
    known = Calibration(found, source, True)
    base = measured[fitted[0].name]
    figures = {
        case.name: errors(case, measured[case.name], base, plan_run(question(case, arguments.threads, known)))
        for case in every
    }
    if arguments.calibrate:
        runs = {case.name: {k: v for k, v in measured[case.name].items() if k.startswith("time/")} for case in fitted}
        where = {"machine": report.machine(), "date": date.today().isoformat(), "python": platform.python_version()}
        calibration.save("cpu", known, where | {"versions": report.versions("ray", "transformers"), "runs": runs})
    text = page(figures, found, (fitted, judged))
    report.finish(arguments, "planner", page=text, figures={"cases": figures, "coefficients": vars(found)})


if __name__ == "__main__":
    main()
