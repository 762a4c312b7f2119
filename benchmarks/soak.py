"""A long run whose actors are killed at random moments: does it leak?

    python -m benchmarks.soak [--steps 500] [--kill-every 30] [--quick] [--json PATH] [--out docs/results]

A run of the bundled model in processes of its own (asynchronous, two samplers, a reference, the rewards, a trainer)
loses one of its actors by SIGKILL now and then, each role in turn. Meanwhile memory, file handles, processes and
shared memory (Ray's object store, weights) are looked at from outside.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import matplotlib as mpl
import numpy as np
import psutil

from benchmarks import report
from benchmarks.report import MIB
from rlsys.tracking.ledger import audit
from rlsys.tracking.ledger_command import as_dict
from rlsys.tracking.memory import pss_bytes
from rlsys.tracking.metrics import read_metrics

mpl.use("agg")
import matplotlib.pyplot as plt

CONFIG = (
    "+recipe=grpo_qwen", "controller=async", "controller.max_staleness=2", "+algorithm.correction.tis_token={}",
    "algorithm.kl.coef=0.001", "rollout=torch", "rollout.workers=2", "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4", "trainer.lr=1e-6", "eval.every=0", "checkpoint.every=10", "checkpoint.keep_last=2",
    "checkpoint.export=false", "tracker.display=plain", "tracker.rollouts=0",
)  # fmt: skip
ROLES = {
    "rollout": "RolloutWorker",
    "reward": "RewardWorker",
    "reference": "ReferenceWorker",
    "trainer": "TrainerWorker",
}
QUANTITIES = {
    "memory": ("MiB (PSS)", MIB), "driver_memory": ("MiB (PSS)", MIB), "handles": ("open files", 1),
    "processes": ("processes", 1), "shared_memory": ("MiB", MIB),
}  # fmt: skip
_WARM = 0.25  # share of the steps that does not count: caches and allocators fill
_LEAK = 0.10  # growth over the counted steps, of the mean, from which on a slope is called a leak
_LOOK_S = 3.0


@dataclass(frozen=True)
class Look:
    """One look at the run. All its processes together; driver_memory: the driver's alone. Bytes."""

    seconds: float
    step: int
    memory: int
    driver_memory: int
    handles: int
    processes: int
    shared_memory: int


@dataclass(frozen=True)
class Kill:
    seconds: float
    step: int
    role: str


@dataclass(frozen=True)
class Slope:
    """growth: over the counted steps, as a share of the mean; error: its standard error; leaks: whether it is both
    larger than chance (three standard errors) and large."""

    mean: float
    growth: float
    error: float

    @property
    def leaks(self) -> bool:
        return self.growth > _LEAK and self.growth > 3 * self.error


def family(driver: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [driver, *driver.children(recursive=True)]
    return []


def command_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def actors(processes: Sequence[psutil.Process], role: str) -> list[psutil.Process]:
    """Ray names a process by its actor's class, and while it works by the method too."""
    return [p for p in processes if re.match(rf"ray::{ROLES[role]}\b", command_of(p))]


def shared_bytes(pid: int) -> int:
    """A process's share of shared memory: pages that the object store, or weights on their way, have used."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Shmem:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return 0


def look(driver: psutil.Process, seconds: float, step: int) -> Look:
    processes = family(driver)
    handles = 0
    for process in processes:
        with suppress(psutil.Error):
            handles += process.num_fds()
    memory = sum(pss_bytes(process.pid) for process in processes)
    own = pss_bytes(driver.pid)
    shared = sum(shared_bytes(process.pid) for process in processes)
    return Look(seconds, step, memory, own, handles, len(processes), shared)


def step_of(folder: Path) -> int:
    """Last step of the run in ``folder`` that ended."""
    files = list(folder.glob("*/metrics.jsonl"))
    if not files:
        return 0
    with files[0].open("rb") as file:
        file.seek(max(0, files[0].stat().st_size - 20_000))
        found = re.findall(rb'^\{"step": (\d+)', file.read(), re.MULTILINE)
    return int(found[-1]) if found else 0


def soak(steps: int, kill_every: int, seed: int, folder: Path) -> tuple[list[Look], list[Kill], int, str]:
    """Looks, kills, exit code and the end of what the run said."""
    chooser = random.Random(seed)
    command = [sys.executable, "-m", "rlsys.launch", *CONFIG, f"steps={steps}", f"run_root={folder}", "name=soak"]
    log = folder / "log"
    looks: list[Look] = []
    kills: list[Kill] = []
    due = kill_every
    with log.open("w") as output, started(command, output) as run:
        driver, began = psutil.Process(run.pid), time.monotonic()
        while run.poll() is None:
            step, seconds = step_of(folder), time.monotonic() - began
            if step:
                looks.append(look(driver, seconds, step))
            if due <= step < steps - 5:
                time.sleep(chooser.random())  # anywhere in a step
                role = list(ROLES)[len(kills) % len(ROLES)]
                victims = actors(family(driver), role)
                if victims:
                    chooser.choice(victims).kill()
                    kills.append(Kill(seconds, step, role))
                    due = step + chooser.randint(kill_every // 2, 3 * kill_every // 2)
                    sys.stderr.write(f"step {step}: {role} killed\n")
            time.sleep(_LOOK_S)
    return looks, kills, run.returncode, log.read_text()[-3000:]


@contextmanager
def started(command: list[str], output: TextIO) -> Iterator[subprocess.Popen]:
    """A process that does not outlive this one's interest in it."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def slope(looks: Sequence[Look], name: str) -> Slope:
    """By least squares over the steps, first quarter left out."""
    last = looks[-1].step
    counted = [one for one in looks if one.step >= _WARM * last]
    x = np.array([one.step for one in counted], dtype=np.float64)
    y = np.array([getattr(one, name) for one in counted], dtype=np.float64)
    if len(counted) < 3 or np.ptp(x) == 0:
        return Slope(float(y.mean()), 0.0, float("inf"))
    (rate, _), covariance = np.polyfit(x, y, 1, cov="unscaled")
    residuals = y - np.polyval(np.polyfit(x, y, 1), x)
    error = float(np.sqrt(covariance[0, 0] * residuals.var(ddof=2)))
    scale = np.ptp(x) / max(y.mean(), 1e-9)
    return Slope(float(y.mean()), float(rate * scale), float(error * scale))


def picture(looks: Sequence[Look], kills: Sequence[Kill], path: Path) -> None:
    figure, axes = plt.subplots(len(QUANTITIES), 1, figsize=(8, 9), layout="constrained", sharex=True)
    for axis, (name, (unit, scale)) in zip(axes, QUANTITIES.items(), strict=True):
        axis.plot([one.step for one in looks], [getattr(one, name) / scale for one in looks])
        for kill in kills:
            axis.axvline(kill.step, color=f"C{1 + list(ROLES).index(kill.role)}", alpha=0.5, linewidth=0.8)
        axis.set(ylabel=f"{name.replace('_', ' ')}\n{unit}")
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="step (lines: a kill)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(looks: Sequence[Look]) -> str:
    rows = []
    for name, (unit, scale) in QUANTITIES.items():
        found = slope(looks, name)
        values = [getattr(one, name) / scale for one in looks]
        rows.append(
            (
                name.replace("_", " "),
                unit,
                f"{found.mean / scale:,.0f}",
                f"{min(values):,.0f} – {max(values):,.0f}",
                f"{100 * found.growth:+.1f} % ± {100 * found.error:.1f} %",
                "leaks" if found.leaks else "no leak",
            )
        )
    return report.table(("", "unit", "mean", "range", "growth over the run", ""), rows)


def page(looks: Sequence[Look], kills: Sequence[Kill], figures: dict[str, Any], command: str) -> str:
    by_role = ", ".join(f"{role} {number}" for role, number in sorted(Counter(kill.role for kill in kills).items()))
    books = figures["ledger"]
    return f"""# Soak

{figures["steps"]} steps of a small asynchronous run in {figures["seconds"] / 60:.0f} minutes. {len(kills)} of its
actors were killed (SIGKILL) at random moments: {by_role}. It ended with exit code {figures["exit_code"]} after
{figures["steps_done"]} steps. Ledger: {books["distinct_samples_trained"]:,} distinct samples trained,
{books["violations"]["trained twice"]} of them twice; {books["violations"]["lost"]} groups lost; {books["reissues"]}
attempts handed out again; {books["voided_samples"]} samples trained on lineages that were given up.

{table(looks)}

![soak](soak.png)

Memory: proportional set sizes of the driver, of Ray's processes and of all actors; shared pages count once. Shared
memory: pages of Ray's object store and of weights on their way that have been used. Growth:
slope of a straight line through all looks but those of the first quarter of the steps, times the steps counted, as a
share of the mean; ± one standard error. It is called a leak from {100 * _LEAK:.0f} % on, where it is larger than three
standard errors. A kill takes a process away until another one has started: the lower ends of the ranges.

{report.measured(command, "ray")}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kill-every", type=int, default=30, help="steps between two kills, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the run ends with it
    steps, kill_every = (20, 5) if arguments.quick else (arguments.steps, arguments.kill_every)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        looks, kills, status, said = soak(steps, kill_every, arguments.seed, folder)
        if not looks:
            sys.exit(f"the run never did a step:\n{said}")
        (run,) = folder.glob("*-soak")
        steps_done = max(line["step"] for line in read_metrics(run / "metrics.jsonl"))
        figures: dict[str, Any] = {
            "steps": steps, "steps_done": steps_done, "exit_code": status, "seconds": looks[-1].seconds,
            "ledger": as_dict(audit(run)), "kills": [asdict(kill) for kill in kills],
            "slopes": {name: asdict(slope(looks, name)) for name in QUANTITIES},
            "looks": [asdict(one) for one in looks],
        }  # fmt: skip
    leaks = [name for name in QUANTITIES if slope(looks, name).leaks]
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        picture(looks, kills, arguments.out / "soak.png")
    command = f"benchmarks.soak --steps {steps} --kill-every {kill_every}"
    report.finish(arguments, "soak", page=page(looks, kills, figures, command), figures=figures, packages=["ray"])
    if status or leaks or not figures["ledger"]["ok"]:
        sys.exit(f"exit code {status}, leaks: {', '.join(leaks) or 'none'}\n{said if status else ''}")


if __name__ == "__main__":
    main()
