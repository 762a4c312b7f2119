"""What stale samples do to learning, and what a correction makes of it: runs of the bundled task.

    python -m benchmarks.staleness [--bounds 1 4 8] [--only ROW …] [--seeds 0 1 2] [--steps 40] [--quick] [--json PATH]
                                   [--out docs/results]

Every setting is a real run in a process of its own: synchronous, and asynchronous with each bound, without a correction
and with one. Training takes longer than sampling here, so that the sampler runs ahead until the bound stops it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.learning import Curve, Runs, picture, run

COMMON = (
    "+recipe=grpo_qwen", "rollout=torch", "data.prompts_per_step=16", "trainer.schedule=constant",
    "eval.problems=1000",
)  # fmt: skip
CORRECTIONS = {
    "no correction": ["controller.uncorrected=true"],
    "token weights": ["+algorithm.correction.tis_token={}"],
}
JUDGED = 4  # the staleness that is to be within noise of synchronous


def settings_of(bounds: list[int]) -> dict[str, list[str]]:
    """Overrides by label. A bound of 0 has nothing to correct."""
    found = {"synchronous": ["controller=sync"], "0": ["controller=async", "controller.max_staleness=0"]}
    for bound in bounds:
        for name, overrides in CORRECTIONS.items():
            found[f"{bound}, {name}"] = ["controller=async", f"controller.max_staleness={bound}", *overrides]
    return found


def staleness(curve: Curve) -> float:
    """Mean over samples and steps."""
    found = [line["async/staleness_mean"] for line in curve.metrics if "async/staleness_mean" in line]
    return statistics.fmean(found) if found else 0.0


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(runs: Runs) -> str:
    header = ("staleness ≤", "reached, mean", "held-out accuracy before", "after, mean ± sd", "after, each seed",
              "log-probs apart")  # fmt: skip
    rows = []
    for label, curves in runs.items():
        after = [curve.final for curve in curves]
        apart = [line["mismatch/logprob_abs_mean"] for c in curves for line in c.metrics if "reward/mean" in line]
        rows.append(
            (
                label,
                f"{statistics.fmean(staleness(curve) for curve in curves):.2f}",
                f"{curves[0].points[0][1]:.1%}",
                f"{statistics.fmean(after):.1%}" + (f" ± {spread(after):.1%}" if len(after) > 1 else ""),
                " · ".join(f"{value:.1%}" for value in after),
                f"{statistics.fmean(apart):.3f}",
            )
        )
    return report.table(header, rows)


def verdict(runs: Runs) -> tuple[bool, str]:
    """Whether the mean of the best corrected setting at the judged bound is within two standard errors of the
    difference from synchronous."""
    sync = [curve.final for curve in runs["synchronous"]]
    judged = {label: [c.final for c in curves] for label, curves in runs.items() if label.startswith(f"{JUDGED}, ")}
    corrected = {label: values for label, values in judged.items() if "no correction" not in label}
    if not corrected:
        return True, "The judged bound was not run."
    label, values = max(corrected.items(), key=lambda item: statistics.fmean(item[1]))
    apart = statistics.fmean(values) - statistics.fmean(sync)
    if len(sync) < 2:
        return True, f"Staleness ≤ {label} ends {100 * apart:+.1f} percentage points from synchronous; one seed."
    error = (spread(sync) ** 2 / len(sync) + spread(values) ** 2 / len(values)) ** 0.5
    within = apart >= -2 * error
    return within, (
        f"Staleness ≤ {label} ends {100 * apart:+.1f} percentage points from synchronous; the standard error of the "
        f"difference is {100 * error:.1f}: {'within' if within else 'outside'} two of them."
    )


def page(runs: Runs, seeds: list[int], steps: int, lr: str) -> str:
    said = verdict(runs)[1]
    return f"""# Learning from stale samples

GRPO on the bundled task (two-digit additions), {steps} steps of 16 prompts × 8 samples at a constant learning rate of
{lr}; greedy accuracy on 1,000 held-out problems. Seeds {", ".join(map(str, seeds))}.

{table(runs)}

{said}

*Reached*: steps between the trainer's weights and the oldest token of a group, mean over groups and steps. A training
step takes longer than sampling its batch here, so the sampler runs ahead until the bound stops it; the first steps, in
which it begins, count too. *Token weights*: `+algorithm.correction.tis_token={{}}`, every token's loss times
min(π_old/μ, 2). *Log-probs apart*: mean |log π_old − log μ| in nats a token, over the steps. What staleness costs
depends on it, and so on the learning rate, more than on the number of steps.

![curves](staleness.png)

{report.measured("benchmarks.staleness", "ray")}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--bounds", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", default="1e-4", help="constant learning rate")
    parser.add_argument(
        "--only", nargs="*", metavar="ROW", help='of the table, "synchronous" besides: "4, token weights"'
    )
    arguments = parser.parse_args()
    steps, seeds = (2, [0]) if arguments.quick else (arguments.steps, arguments.seeds)
    bounds = [JUDGED] if arguments.quick else arguments.bounds
    settings = settings_of(bounds)
    if arguments.only is not None:
        if unknown := set(arguments.only) - set(settings):
            parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(settings)}")
        settings = {label: settings[label] for label in ("synchronous", *arguments.only)}
    runs: Runs = {label: [] for label in settings}
    with tempfile.TemporaryDirectory() as root:
        for seed in seeds:  # seed by seed, so that a run that is cut short has whole seeds
            for number, (label, overrides) in enumerate(settings.items()):
                every = f"eval.every={max(1, steps // 4)}"
                own = [*COMMON, f"trainer.lr={arguments.lr}", *overrides, f"steps={steps}", every, f"seed={seed}"]
                runs[label].append(run(Path(root), f"s{number}-{seed}", own, 1))
                sys.stderr.write(f"{label}, seed {seed}: staleness {staleness(runs[label][-1]):.2f}\n")
            write(arguments, runs, seeds[: seeds.index(seed) + 1], steps)
    sys.exit(0 if verdict(runs)[0] or arguments.quick else 1)


def write(arguments: Any, runs: Runs, seeds: list[int], steps: int) -> None:
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        picture(runs, arguments.out / "staleness.png", "Learning from stale samples")
    figures = {
        "seeds": seeds,
        "accuracy": {label: [curve.points for curve in curves] for label, curves in runs.items()},
        "staleness": {label: [staleness(curve) for curve in curves] for label, curves in runs.items()},
        "verdict": verdict(runs)[1],
    }
    report.finish(
        arguments, "staleness", page=page(runs, seeds, steps, arguments.lr), figures=figures, packages=["ray"]
    )


if __name__ == "__main__":
    main()
