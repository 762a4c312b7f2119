"""The live panel: progress, figures with their history, where the time goes."""

from __future__ import annotations

import atexit
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rlsys.tracking.blocks import (
    ACCENT,
    count,
    duration,
    figure,
    header_block,
    percent,
    print_summary,
    sparkline,
)
from rlsys.tracking.progress import Progress

_PHASE_STEPS = 10  # steps that phase times are averaged over
_SPARK_WIDTH, _NARROW_SPARK_WIDTH, _NARROW = 14, 10, 92  # columns
_PHASE_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "white", "bright_black")
_NOT_PHASES = {"time/step_s", "time/elapsed_s"}


class _Shown(NamedTuple):
    label: str
    metric: str
    style: str


_FIGURES = (
    _Shown("reward", "reward/mean", "green"),
    _Shown("held-out", "eval/accuracy", "bold green"),
    _Shown("entropy", "policy/entropy", "cyan"),
    _Shown("tokens/s", "throughput/tokens_per_s", "cyan"),
    _Shown("mismatch", "mismatch/logprob_abs_mean", "magenta"),
    _Shown("response", "rollout/length_mean", "magenta"),
)


class LiveDisplay:
    """Redrawn a few times a second by rich's own thread, from the state that the calls leave here.

    See :class:`rlsys.tracking.display.Display` for the calls.
    """

    def __init__(self, console: Console, *, title: str, steps: int, first_step: int = 0):
        self._console, self._title = console, title
        self._progress = Progress(steps, first_step)
        self._history: dict[str, list[float]] = defaultdict(list)
        self._last: dict[str, float] = {}
        self._phase_times: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_PHASE_STEPS))
        self._phase, self._phase_since = "starting", time.monotonic()
        self._alert: str | None = None
        self._spinner = Spinner("dots", style=ACCENT)
        self._live: Live | None = None

    def start(self, header: Mapping[str, str]) -> None:
        self._console.print(header_block(self._title, header))
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=5, transient=False)
        atexit.register(self.close)  # a crash must not leave the cursor hidden either
        self._live.start()

    def phase(self, name: str) -> None:
        self._phase, self._phase_since = name, time.monotonic()

    def step(self, metrics: Mapping[str, float]) -> None:
        self._progress.update(metrics)
        self._last.update(metrics)
        for shown in _FIGURES:
            if shown.metric in metrics:
                self._history[shown.metric].append(metrics[shown.metric])
        if "time/step_s" in metrics:
            self._time_phases(metrics)

    def note(self, text: str, *, alert: bool = False) -> None:
        if alert:
            self._alert = text  # in the panel until the next one: an alarm may go off at every step
        else:
            self._console.print(Text(text, "dim"))

    def finish(self, summary: Mapping[str, Any], *, plot: Path | None = None, next_command: str | None = None) -> None:
        self._phase = str(summary["status"])
        self.close()
        print_summary(self._console, summary, plot, next_command)

    def close(self) -> None:
        """Stops redrawing and shows the cursor again."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            atexit.unregister(self.close)

    def _time_phases(self, metrics: Mapping[str, float]) -> None:
        """A phase that a step went without (an evaluation) took it no time."""
        times = {
            name.removeprefix("time/").removesuffix("_s"): value
            for name, value in metrics.items()
            if name.startswith("time/") and name.endswith("_s") and name not in _NOT_PHASES
        }
        for name in times.keys() | self._phase_times.keys():
            self._phase_times[name].append(times.get(name, 0.0))

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress_line(), self._phase_line(), Text(""), self._figures()]
        if self._phase_times:
            parts += [Text(""), *self._time_bar()]
        if self._alert:
            parts += [Text(""), Text(f"! {self._alert}", "bold yellow")]
        return Panel(Group(*parts), border_style="dim", expand=True)

    def _progress_line(self) -> RenderableType:
        step, steps = self._progress.step, self._progress.steps
        left = self._progress.left_s()
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(steps, step, complete_style=ACCENT, finished_style="green")
        times = f"{duration(self._progress.elapsed_s())}" + (
            f" · {duration(left)} left" if left and step < steps else ""
        )
        grid.add_row(Text(f"step {step}/{steps}", "bold"), bar, Text(times))
        return grid

    def _phase_line(self) -> RenderableType:
        if self._live is None:
            return Text(self._phase, "dim")
        self._spinner.text = Text(f"{self._phase}  {time.monotonic() - self._phase_since:.1f} s", "dim")
        return self._spinner

    def _figures(self) -> RenderableType:
        """Two figures a line: name, value, history."""
        width = _NARROW_SPARK_WIDTH if self._console.width < _NARROW else _SPARK_WIDTH
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(2):
            grid.add_column(style="dim", no_wrap=True, width=8)
            grid.add_column(no_wrap=True, ratio=1)
            grid.add_column(no_wrap=True, width=width)
        cells: list[RenderableType] = []
        for shown in _FIGURES:
            history = Text(sparkline(self._history[shown.metric], width), shown.style)
            cells += [shown.label, self._value(shown), history]
        for start in range(0, len(cells), 6):
            grid.add_row(*cells[start : start + 6])
        return grid

    def _value(self, shown: _Shown) -> Text:
        value = self._last.get(shown.metric)
        if value is None:
            return Text("–", "dim")
        aside = ""
        match shown.metric:
            case "eval/accuracy":
                text = percent(value)
                low, high = self._last.get("eval/accuracy_low"), self._last.get("eval/accuracy_high")
                if low is not None and high is not None:
                    aside = f" {100 * low:.0f}–{100 * high:.0f}"
            case "throughput/tokens_per_s":
                text = count(value)
                mfu = self._last.get("throughput/mfu")
                aside = "" if mfu is None else f" MFU {percent(mfu)}"
            case "rollout/length_mean":
                text, aside = f"{value:.1f}", " tokens"
            case _:
                text = figure(value)
        if shown.metric == "reward/mean" and "reward/std" in self._last:
            aside = f" ± {self._last['reward/std']:.2f}"
        return Text.assemble((text, shown.style), (aside, "dim"))

    def _time_bar(self) -> list[RenderableType]:
        """Mean time of each phase over the last steps: a bar of their shares, and the seconds."""
        means = {name: sum(times) / len(times) for name, times in self._phase_times.items()}
        means = dict(sorted(means.items(), key=lambda item: -item[1])[: len(_PHASE_COLOURS)])
        total = sum(means.values()) or 1.0
        bar = Table.grid(expand=True, padding=0)
        legend = Text(overflow="fold")
        row = []
        for (name, seconds), colour in zip(means.items(), _PHASE_COLOURS, strict=False):
            share = round(1000 * seconds / total)
            legend.append("■ ", colour).append(f"{name} ", "dim").append(f"{seconds:.2f} s   ")
            if share >= 10:  # a phase below 1 % has no width
                bar.add_column(ratio=share)
                row.append(_Fill(colour))
        bar.add_row(*row)
        return [bar, legend]


class _Fill:
    """A coloured bar as wide as its cell."""

    def __init__(self, colour: str):
        self._colour = colour

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield Text("━" * options.max_width, self._colour, no_wrap=True, overflow="crop")
