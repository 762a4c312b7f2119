"""What a person at the terminal sees of a run: a live panel, or plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console

from rlsys.tracking.blocks import count, duration, figure, header_block, percent, print_summary
from rlsys.tracking.live import LiveDisplay
from rlsys.tracking.progress import Progress


class Display(Protocol):
    """Shows a run. ``close`` gives the terminal back as it was, whatever happened, and may be called twice."""

    def start(self, header: Mapping[str, str]) -> None:
        """The block that says what will be trained on what (:func:`rlsys.tracking.blocks.header_rows`)."""
        ...

    def phase(self, name: str) -> None:
        """What is being done from now on (``rollout``, ``train``, …)."""
        ...

    def step(self, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``: ``step`` and the metrics."""
        ...

    def note(self, text: str, *, alert: bool = False) -> None:
        """A sentence for the user; an alert is shown so that it is noticed."""
        ...

    def finish(self, summary: Mapping[str, Any], *, plot: Path | None = None, next_command: str | None = None) -> None:
        """The block that says what came of it; ends the display. See :func:`rlsys.tracking.blocks.print_summary`."""
        ...

    def close(self) -> None: ...


def make_display(
    mode: Literal["auto", "live", "plain"],
    *,
    title: str,
    steps: int,
    first_step: int = 0,
    console: Console | None = None,
) -> Display:
    """The display of a run.

    Args:
        mode: ``auto``: live on a terminal, plain lines elsewhere (config: ``tracker.display``).
        title: of the block at the start.
        steps: of the whole run; first_step: done before this session.
        console: to write to; None: standard output.
    """
    console = console or Console(file=sys.stdout, highlight=False)
    if mode == "live" or (mode == "auto" and console.is_terminal):
        return LiveDisplay(console, title=title, steps=steps, first_step=first_step)
    return PlainDisplay(console, title=title, steps=steps, first_step=first_step)


class PlainDisplay:
    """One line a step, but at most one every ``every_s`` seconds besides evaluations and the last step."""

    def __init__(self, console: Console, *, title: str, steps: int, first_step: int = 0, every_s: float = 2.0):
        self._console, self._title, self._every_s = console, title, every_s
        self._progress = Progress(steps, first_step)
        self._printed = -float("inf")

    def start(self, header: Mapping[str, str]) -> None:
        self._console.print(header_block(self._title, header))

    def phase(self, name: str) -> None:
        """Not shown: a log wants no line for each phase."""

    def step(self, metrics: Mapping[str, float]) -> None:
        self._progress.update(metrics)
        now = time.monotonic()
        evaluated = "eval/accuracy" in metrics
        if evaluated or self._progress.done or now - self._printed >= self._every_s:
            self._printed = now
            self._say(self._line(metrics))

    def note(self, text: str, *, alert: bool = False) -> None:
        self._say(f"{'ALERT: ' if alert else ''}{text}")

    def finish(self, summary: Mapping[str, Any], *, plot: Path | None = None, next_command: str | None = None) -> None:
        print_summary(self._console, summary, plot, next_command)

    def close(self) -> None:
        """Nothing to give back."""

    def _line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"step {self._progress.step:>{len(str(self._progress.steps))}}/{self._progress.steps}"]
        formats = {
            "reward/mean": lambda value: f"reward {value:.3f}",
            "eval/accuracy": lambda value: f"held-out {percent(value)}",
            "policy/entropy": lambda value: f"entropy {figure(value)}",
            "mismatch/logprob_abs_mean": lambda value: f"mismatch {value:.1e}",
            "throughput/tokens_per_s": lambda value: f"{count(value)} tok/s",
            "throughput/mfu": lambda value: f"MFU {percent(value)}",
            "time/step_s": lambda value: f"{value:.2f} s",
        }
        parts += [show(metrics[name]) for name, show in formats.items() if name in metrics]
        left = self._progress.left_s()
        if left is not None and not self._progress.done:
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
