"""What both displays show at the start and at the end, and how figures are written for people."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlsys.config.schema import AlgorithmConfig, RunConfig

ACCENT = "cyan"
_BARS = "▁▂▃▄▅▆▇█"


def percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """``8.4 s``, ``1 min 32 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(amount: float) -> str:
    """Bytes as ``3.4 GiB``."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def count(number: float) -> str:
    """``812``, ``5,210``, ``1.24 M``, ``7.6 B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:,.0f}"


def figure(value: float) -> str:
    """Three digits that mean something, whatever the magnitude."""
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def short_path(path: Path) -> str:
    """Relative to the working folder where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as a line of little bars, the newest at the right, averaged into at most ``width`` bins."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    bins = min(width, len(finite))
    edges = [round(i * len(finite) / bins) for i in range(bins + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in means)


def header_rows(
    config: RunConfig,
    *,
    parameters: int,
    training_problems: int | None,
    held_out_problems: int,
    ranks: int,
    cluster: str,
    run_folder: Path,
    resumed_step: int | None = None,
) -> dict[str, str]:
    """What will be trained on what, for :meth:`rlsys.tracking.display.Display.start`.

    Args:
        parameters: of the model.
        training_problems: None: endless.
        ranks: trainer processes.
        cluster: in a few words (``local Ray, 2 CPUs``).
        resumed_step: the step that the run goes on from.
    """
    data, rollout, algorithm = config.data, config.rollout, config.algorithm
    samples = data.prompts_per_step * rollout.samples_per_prompt
    training = "endless" if training_problems is None else count(training_problems)
    return {
        "model": f"{config.model.path} · {count(parameters)} parameters · {config.model.dtype}",
        "data": f"{data.kind} · {training} training problems · {count(held_out_problems)} held out",
        "reward": " + ".join(
            (f"{part.weight:g} × " if part.weight != 1 else "") + name + (f" ({part.use})" if part.use != name else "")
            for name, part in config.reward.parts.items()
        )
        + (" · permuted over the batch: the control" if config.reward.permute else ""),
        "batch": f"{data.prompts_per_step} prompts × {rollout.samples_per_prompt} samples = {samples} responses "
        f"a step, at most {data.max_response_tokens} tokens each",
        "algorithm": f"{_channels(algorithm)} · lr {config.trainer.lr:g}",
        "steps": f"{config.steps} · seed {config.seed}"
        + (f" · resumed after step {resumed_step}" if resumed_step is not None else ""),
        "cluster": f"{cluster} · trainer: {ranks} × {config.trainer.backend} · "
        f"sampler: {rollout.workers} × {rollout.engine}",
        "run folder": short_path(run_folder),
    }


def _channels(algorithm: AlgorithmConfig) -> str:
    """The terms of the loss, each with its weight where that is not 1."""
    kl, distillation, preference = algorithm.kl, algorithm.distillation, algorithm.preference
    policy = f"{algorithm.advantage} · {algorithm.loss} · {algorithm.aggregation}"
    if kl.coef:
        policy += f" · KL {kl.coef:g} ({kl.estimator}, in the {kl.placement})"
    teacher = f"distillation ({distillation.divergence}, teacher: {distillation.teacher})"
    terms = (
        (algorithm.weight, policy),
        (distillation.weight, teacher),
        (preference.weight, f"preferences ({preference.loss})"),
    )
    return " + ".join((f"{weight:g} × " if weight != 1 else "") + text for weight, text in terms if weight)


def header_block(title: str, rows: Mapping[str, str]) -> RenderableType:
    """The block at the start."""
    return Panel(_grid(rows), title=Text(title, f"bold {ACCENT}"), title_align="left", border_style=ACCENT, expand=True)


def print_summary(console: Console, summary: Mapping[str, Any], plot: Path | None, next_command: str | None) -> None:
    """The block at the end, and what to do next.

    Args:
        summary: content of ``summary.json``.
        plot: the picture of the learning curves.
        next_command: after a finished run the same one on a real model and a GPU, after another the way to go on;
            printed without a frame or breaks, to be copied.
    """
    console.print(summary_block(summary, plot))
    if next_command:
        finished = summary["status"] == "finished"
        console.print(Text("The same on a real model and a GPU:" if finished else "To go on:", "bold"))
        console.print(Text(f"  {next_command}"), soft_wrap=True)


def summary_block(summary: Mapping[str, Any], plot: Path | None) -> RenderableType:
    """What came of the run."""
    before, after = summary.get("eval/initial_accuracy"), summary.get("eval/final_accuracy")
    rows: dict[str, str | Text] = {}
    if before is not None and after is not None:
        gain = 100 * (after - before)
        rows["held-out accuracy"] = Text.assemble(
            percent(before),
            " → ",
            (percent(after), "bold green" if gain > 0 else "bold red"),
            f"   ({gain:+.1f} points)",
        )
    rows["steps"] = f"{summary['steps']} in {duration(summary['wall_s'])}"
    rate = summary.get("tokens_per_s")
    rows["tokens"] = f"{count(summary['tokens_generated'])} sampled · {count(summary['tokens_trained'])} trained" + (
        f" · {count(rate)} tokens/s" if rate else ""
    )
    if summary.get("mfu") is not None:
        rows["utilisation"] = f"{percent(summary['mfu'])} of the matrix-multiply peak while training"
    mismatch = summary.get("mismatch/logprob_abs_mean_max")
    if mismatch is not None:
        rows["sampler vs. trainer"] = f"log-probs differ by {figure(mismatch)} at most (mean over a step)"
    rows["peak memory"] = f"{size(summary['peak_memory_bytes'])}, all processes together"
    rows["run folder"] = short_path(Path(summary["run_folder"]))
    if plot is not None:
        rows["learning curves"] = short_path(plot)
    status = summary["status"]
    colour = {"finished": "green", "interrupted": "yellow", "failed": "red"}[status]
    title = Text(f"{summary['name']}: {status}", f"bold {colour}")
    return Panel(_grid(rows), title=title, title_align="left", border_style=colour)


def _grid(rows: Mapping[str, str | Text]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid
