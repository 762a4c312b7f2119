"""A plan in the terminal: who is where, memory by part, seconds by phase, price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlsys.cluster.planner.advice import Advice
from rlsys.cluster.planner.plan import STEPS, RunPlan
from rlsys.engines.footprint import gib
from rlsys.tracking.blocks import count

_BAR = 30
_LINES = 6  # of the placement
_SHORT = {"trainer": "T", "critic": "C", "rollout": "S", "reference": "R"}


def show(console: Console, plan: RunPlan, advice: Sequence[Advice], rescue: Advice | None) -> None:
    """rescue: with what a run fits that does not; None: it does, or nothing was found."""
    _head(console, plan)
    for line in placement_lines(plan):
        console.print(line, markup=False, highlight=False)
    _memory(console, plan)
    _time(console, plan)
    _verdict(console, plan, rescue)
    if advice:
        table = Table("instead", "a step", "saves", title="what to change", title_justify="left")
        for one in advice[:5]:
            saved = 1 - one.plan.step_s / plan.step_s
            table.add_row(escape(one.text), seconds(one.plan.step_s), f"{saved:.0%}")
        console.print(table)
    known = plan.work.calibration
    console.print(f"Rates: {known.source}.", markup=False, highlight=False, soft_wrap=True)


def _head(console: Console, plan: RunPlan) -> None:
    work, shape = plan.work, plan.work.shape
    active = f" ({count(shape.active)} a token)" if shape.experts else ""
    where = f"{work.topology.gpus} GPUs" if work.gpus else f"{work.topology.cores} cores"
    assumed = "" if work.tokens.stated else " (assumed: half of the longest; --response-tokens says better)"
    console.print(
        f"[bold]{escape(work.config.name)}[/]: {escape(shape.name)}, {count(shape.parameters)} parameters{active}, "
        f"{work.config.model.dtype}, on {work.topology.name}: {len(work.topology.nodes)} node(s), {where}\n"
        f"A step: {work.samples} samples of {work.tokens.prompt:.0f} + {work.tokens.response:.0f} tokens{assumed}",
        highlight=False,
    )


def placement_lines(plan: RunPlan) -> list[str]:
    """One a node, neighbours that look the same in one line."""
    work = plan.work
    if not work.gpus:
        roles = Counter(actor.role for actor in work.layout.actors)
        return ["  " + ", ".join(f"{number} × {role}" for role, number in roles.items()) + " on the host's cores"]
    on = _actors_by_gpu(plan)
    grouped: list[tuple[list[str], str]] = []
    for node in work.topology.nodes:
        cells = "".join(f"[{'+'.join(letters) or '·'}]" for letters in on[node.id])
        if grouped and grouped[-1][1] == cells:
            grouped[-1][0].append(node.id)
        else:
            grouped.append(([node.id], cells))
    drawn = [f"  {names[0] if len(names) == 1 else f'{names[0]} … {names[-1]}'}  {cells}" for names, cells in grouped]
    more = [f"  … and {len(drawn) - _LINES} more lines"] if len(drawn) > _LINES else []
    used = [f"{letter} {role}" for role, letter in _SHORT.items() if work.layout.of(role)]
    return [*drawn[:_LINES], *more, f"  {', '.join(used)}, · free"]


def _actors_by_gpu(plan: RunPlan) -> dict[str, list[list[str]]]:
    """By node, the letters of the actors on each of its GPUs; bundles take a node's GPUs one after the other."""
    work = plan.work
    found: dict[str, list[list[str]]] = {node.id: [[] for _ in range(node.gpus)] for node in work.topology.nodes}
    taken: Counter[str] = Counter()
    places: list[list[list[str]]] = []
    for bundle, node in zip(work.layout.bundles, work.layout.booking.nodes, strict=True):
        first = taken[node]
        taken[node] += int(bundle["GPU"])
        places.append(found[node][first : taken[node]])
    for actor in work.layout.actors:
        if actor.bundle is not None:
            for letters in places[actor.bundle]:
                letters.append(_SHORT[actor.role])
    return found


def _memory(console: Console, plan: RunPlan) -> None:
    memory = plan.memory
    whose = "of a GPU" if plan.work.gpus else "of the host"
    name, needed = memory.peak
    table = Table(f"memory {whose}, {name}", "GiB", "", title_justify="left")
    for part, size in sorted(memory.phases[name].items(), key=lambda item: -item[1]):
        table.add_row(part, gib(size), _bar(size, max(memory.capacity, needed)))
    table.add_row("together", gib(needed), f"of {gib(memory.capacity)}", style="bold")
    others = {phase: sum(parts.values()) for phase, parts in memory.phases.items() if phase != name}
    for phase, size in others.items():
        table.add_row(f"({phase})", gib(size), _bar(size, max(memory.capacity, needed)))
    if memory.main:
        needed = sum(memory.main.values())
        table.add_row("main memory of a node", gib(needed), f"of {gib(memory.main_capacity)}")
    console.print(table)


def _time(console: Console, plan: RunPlan) -> None:
    table = Table("phase", "time", "share", "mostly", "", title_justify="left")
    for name, phase in plan.phases.items():
        share = phase.seconds / plan.step_s
        mark = "bottleneck" if name == plan.bottleneck else ""
        table.add_row(name, seconds(phase.seconds), f"{share:.0%}", phase.bound, mark)
    console.print(table)
    price = f", ${plan.dollars:,.0f} for {STEPS:,} steps" if plan.work.machine.dollars else ""
    console.print(
        f"A step takes {seconds(plan.step_s)} ({plan.tokens_per_s:,.0f} sampled tokens/s, MFU of the update "
        f"{plan.mfu:.0%}); {STEPS:,} steps {hours(plan.step_s * STEPS)}{price}",
        highlight=False,
    )


def _verdict(console: Console, plan: RunPlan, rescue: Advice | None) -> None:
    memory = plan.memory
    if memory.fits:
        console.print(f"[green]fits[/]: {gib(memory.capacity - memory.peak[1])} GiB to spare", highlight=False)
        return
    missing = memory.peak[1] - memory.capacity
    short = f"{gib(missing)} GiB are missing" if missing > 0 else "the nodes' main memory is too small"
    console.print(f"[bold red]does not fit[/]: {short} ({memory.peak[0]})", highlight=False)
    if rescue is None:
        console.print(
            "No setting makes it fit: it takes an adapter (model.lora.rank=16), a smaller model, or more GPUs.",
            highlight=False,
            soft_wrap=True,
        )
        return
    step = seconds(rescue.plan.step_s)
    console.print(f"It fits with: {escape(rescue.text)}  (a step {step})", highlight=False, soft_wrap=True)


def _bar(size: float, whole: float) -> str:
    return "█" * round(_BAR * size / whole)


def seconds(value: float) -> str:
    """``12 ms``, ``3.4 s``, ``12.3 min``"""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 60:.1f} min"


def hours(value: float) -> str:
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"
