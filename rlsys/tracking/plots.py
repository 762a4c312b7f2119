"""Learning curves as a picture. matplotlib is imported only when one is drawn, and draws without a screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.checkpoint.atomic import writing
from rlsys.tracking.metrics import Line, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")  # Okabe and Ito's
_LINES = ("-", "--", ":", "-.")  # for more runs than colours
_LEGEND_INSIDE = 6  # curves; the names of more would cover them
_NOT_PHASES = {"time/step_s", "time/elapsed_s"}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.prop_cycle": None,  # set when matplotlib is there
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def plot_run(folder: Path) -> Path:
    """Draws ``curves.png`` from the ``metrics.jsonl`` of a run folder.

    Raises:
        UserError: no readable metrics, or the picture cannot be written.
    """
    steps = read_metrics(folder / "metrics.jsonl")
    panels = (_accuracy, _reward, _entropy, _divergence, _length, _time)
    return _draw(folder / "curves.png", folder.name, panels, lambda panel, axes: panel(axes, steps))


def plot_comparison(runs: Mapping[str, Sequence[Line]], path: Path, title: str = "") -> Path:
    """Draws several runs into one picture: held-out accuracy, reward, entropy, length.

    Args:
        runs: label → what :func:`rlsys.tracking.metrics.read_metrics` gave, in the order of the legend.
        path: of the PNG.
    """
    named = {
        "held-out accuracy, %": ("eval/accuracy", 100.0),
        "reward": ("reward/mean", 1.0),
        "entropy, nats": ("policy/entropy", 1.0),
        "response length, tokens": ("rollout/length_mean", 1.0),
    }

    def panel(name: str, axes: Axes) -> None:
        metric, scale = named[name]
        axes.set_title(name)
        for number, (label, steps) in enumerate(runs.items()):
            x, y = _series(steps, metric, scale)
            line = _LINES[number // len(_COLOURS) % len(_LINES)]
            width = 1.3 + 1.7 * (len(runs) - 1 - number) / max(len(runs) - 1, 1)  # one that lies below another shows
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(x, y, line, color=colour, linewidth=width, label=label, **_marks(x))
        if few and axes.get_subplotspec().is_first_row() and axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.legend(loc="best")

    few = len(runs) <= _LEGEND_INSIDE
    return _draw(path, title, list(named), panel, legend=not few)


def _draw(
    path: Path, title: str, panels: Sequence[Any], draw: Callable[[Any, Axes], None], *, legend: bool = False
) -> Path:
    """Lays panels out in two rows and writes the picture.

    Args:
        legend: one for all panels, below them, with the names in the first.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = math.ceil(len(panels) / 2)
    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=_COLOURS)}):
        figure: Figure = Figure(figsize=(4.4 * columns, 6.2), layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: no global state, no screen
        for axes, panel in zip(figure.subplots(2, columns).flat, panels, strict=True):
            draw(panel, axes)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
            if not axes.has_data():
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#999999")
        if legend:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        if title:
            figure.suptitle(title, fontsize=11)
        with writing("the picture", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130)
    return path


def _series(steps: Sequence[Line], metric: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """x and y of the steps that have the metric."""
    points = [(line["step"], scale * line[metric]) for line in steps if metric in line]
    return [x for x, _ in points], [y for _, y in points]


def _marks(x: Sequence[int]) -> dict[str, Any]:
    """Few points are marked, so that a single one is visible."""
    return {"marker": "o", "markersize": 3.5} if len(x) <= 25 else {}


def _accuracy(axes: Axes, steps: Sequence[Line]) -> None:
    axes.set_title("held-out accuracy, %")
    x, y = _series(steps, "eval/accuracy", 100)
    if not x:
        return
    _, low = _series(steps, "eval/accuracy_low", 100)
    _, high = _series(steps, "eval/accuracy_high", 100)
    if len(low) == len(high) == len(x):
        axes.fill_between(x, low, high, alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(x, y, **_marks(x))
    axes.annotate(f"{y[0]:.1f}", (x[0], y[0]), textcoords="offset points", xytext=(5, -11))
    axes.annotate(
        f"{y[-1]:.1f}", (x[-1], y[-1]), textcoords="offset points", xytext=(-4, -13), ha="right", weight="bold"
    )
    for name in sorted({name for line in steps for name in line if _is_sampled_figure(name)}):
        axes.plot(*_series(steps, name, 100), "--", linewidth=1.1, label=name.removeprefix("eval/"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


def _is_sampled_figure(name: str) -> bool:
    return name.startswith(("eval/avg@", "eval/pass@")) and not name.endswith(("_low", "_high"))


def _reward(axes: Axes, steps: Sequence[Line]) -> None:
    axes.set_title("reward")
    x, mean = _series(steps, "reward/mean")
    _, std = _series(steps, "reward/std")
    if len(std) == len(x) and x:
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(x, low, high, alpha=0.15, linewidth=0, color=_COLOURS[2], label="± one standard deviation")
    if x:
        axes.plot(x, mean, color=_COLOURS[2], label="mean", **_marks(x))
        axes.legend(loc="lower right")


def _entropy(axes: Axes, steps: Sequence[Line]) -> None:
    axes.set_title("entropy, nats a token")
    x, y = _series(steps, "policy/entropy")
    if x:
        axes.plot(x, y, color=_COLOURS[3], **_marks(x))
        axes.set_ylim(bottom=0)


def _divergence(axes: Axes, steps: Sequence[Line]) -> None:
    axes.set_title("distance to sampler and reference, nats")
    for metric, label, colour in (
        ("mismatch/logprob_abs_mean", "|log π_old − log μ| (mismatch)", _COLOURS[1]),
        ("policy/kl_ref", "KL to the reference", _COLOURS[5]),
    ):
        x, y = _series(steps, metric)
        positive = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
        if positive:
            axes.plot(*zip(*positive, strict=True), color=colour, label=label, **_marks(x))
    if axes.has_data():
        axes.set_yscale("log")
        axes.legend(loc="best")


def _length(axes: Axes, steps: Sequence[Line]) -> None:
    axes.set_title("response length, tokens")
    x, y = _series(steps, "rollout/length_mean")
    if not x:
        return
    axes.plot(x, y, color=_COLOURS[0], **_marks(x))
    axes.set_ylim(0, 1.15 * max([value for value in y if math.isfinite(value)], default=1.0))
    x, y = _series(steps, "rollout/truncated", 100)
    if any(value > 0 for value in y):
        right = axes.twinx()
        right.plot(x, y, color=_COLOURS[6], linewidth=1.0, linestyle=":")
        right.set_ylabel("cut off at the limit, %", color=_COLOURS[6])
        right.set_ylim(0, max(5.0, *(1.15 * value for value in y if math.isfinite(value))))
        right.grid(visible=False)


def _time(axes: Axes, steps: Sequence[Line]) -> None:
    """Seconds of each phase, stacked; evaluation steps stand out as they should. Tokens/s in the title."""
    rates = [rate for rate in _series(steps, "throughput/tokens_per_s")[1] if math.isfinite(rate)]
    used = sorted(value for value in _series(steps, "throughput/mfu", 100)[1] if math.isfinite(value))
    aside = [f"median {sorted(rates)[len(rates) // 2]:,.0f} tokens/s"] if rates else []
    aside += [f"MFU {used[len(used) // 2]:.0f} %"] if used else []
    axes.set_title("time per phase, s" + (f"  ({', '.join(aside)})" if aside else ""))
    trained = [line for line in steps if "time/step_s" in line]
    names = {
        name for line in trained for name in line if name.startswith("time/") and name.endswith("_s")
    } - _NOT_PHASES
    totals = {name: math.fsum(line.get(name, 0.0) for line in trained) for name in names}
    largest = sorted(totals, key=lambda name: -totals[name])[:6]
    if not largest:
        return
    x = [line["step"] for line in trained]
    rows = [[line.get(name, 0.0) for line in trained] for name in largest]
    labels = [name.removeprefix("time/").removesuffix("_s") for name in largest]
    axes.stackplot(x, rows, labels=labels, colors=_COLOURS, alpha=0.85, linewidth=0)
    whole = sorted(math.fsum(column) for column in zip(*rows, strict=True))
    axes.set_ylim(0, 1.9 * whole[int(0.95 * (len(whole) - 1))])  # a slow evaluation step does not flatten the rest
    axes.legend(loc="upper right", ncols=2)
