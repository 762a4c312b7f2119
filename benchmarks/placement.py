"""Where every actor of three recipes goes, on every kind of cluster: tables made by the functions that a run uses.

    python -m benchmarks.placement [--json PATH] [--out docs/results]

Nothing is measured and nothing is started: the same configuration gives the same page everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir

from benchmarks import report
from rlsys.cluster.placement import Plan, place
from rlsys.cluster.topology import Topology, expected, found, one_host
from rlsys.config.assets import asset
from rlsys.config.build import build
from rlsys.config.compose import open_overrides, register_schemas, to_plain
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig

RECIPES = {
    "grpo_qwen": ("algorithm.kl.coef=0.001",),
    "ppo_qwen": (),
    "composer_qwen": (),
}
_CPU_HOSTS = [
    {"Alive": True, "NodeID": f"host-{n}", "NodeManagerAddress": f"10.0.0.{n}", "Resources": {"CPU": 16.0}}
    for n in (1, 2, 3)
]
LAPTOP = one_host(gpus=0, cores=8)


@dataclass(frozen=True)
class Case:
    """A cluster and how it is used. topology: where only a live cluster could say."""

    title: str
    overrides: tuple[str, ...]
    topology: Topology | None = None


CASES = (
    Case("laptop: one host of 8 cores", ("cluster=local",), LAPTOP),
    Case("three CPU hosts of 16 cores", ("cluster=ray", "trainer.ranks=3", "rollout.workers=3"), found(_CPU_HOSTS)),
    Case("one DGX Spark", ("cluster=gb10",)),
    Case("a pair of DGX Sparks", ("cluster=gb10_pair",)),
    Case("one node of 8 H100, taking turns", ("cluster=h100_node", "rollout.workers=8", "cluster.placement=colocated")),
    Case(
        "one node of 8 H100, two samplers of 2 GPUs",
        ("cluster=h100_node", "rollout.workers=2", "rollout.tensor_parallel=2", "cluster.placement=disaggregated"),
    ),
    Case(
        "4 nodes of 8 H100, rows shared by 4 ranks, weights by 8",
        (
            "cluster=gpu_pool",
            "cluster.nodes=4",
            "trainer.ranks=24",
            "trainer.sequence_ranks=4",
            "trainer.shard_ranks=8",
            "rollout.workers=8",
            "cluster.placement=disaggregated",
        ),
    ),
    Case(
        "one GB200 NVL72, samplers of 4 GPUs",
        (
            "cluster=gb200_nvl72",
            "trainer.ranks=48",
            "trainer.sequence_ranks=8",
            "rollout.workers=6",
            "rollout.tensor_parallel=4",
            "cluster.placement=disaggregated",
        ),
    ),
    Case(
        "16 racks of GB200 NVL72, 1,152 GPUs",
        (
            "cluster=gb200_nvl72",
            "cluster.racks=16",
            "trainer.ranks=768",
            "trainer.sequence_ranks=8",
            "trainer.shard_ranks=64",
            "rollout.workers=96",
            "rollout.tensor_parallel=4",
            "cluster.placement=disaggregated",
        ),
    ),
)
REFUSED = (
    ("rows shared over two racks", ("cluster=gb200_nvl72", "cluster.racks=2", "trainer.sequence_ranks=144")),
    ("a sampler over two trays", ("cluster=gb200_nvl72", "rollout.tensor_parallel=8", "trainer.ranks=64")),
    ("tensor parallel over the pair's link", ("cluster=gb10_pair", "rollout.tensor_parallel=2", "trainer.ranks=1")),
    ("turns where CPU and GPU have one memory", ("cluster=gb10", "cluster.placement=colocated")),
    (
        "groups that racks do not hold a whole number of",
        ("cluster=gb200_nvl72", "cluster.racks=2", "trainer.ranks=144", "trainer.sequence_ranks=16"),
    ),
)


def configured(recipe: str, *overrides: str) -> RunConfig:
    register_schemas()
    with initialize_config_dir(str(asset("configs")), version_base="1.3"):
        return build(to_plain(compose("config", overrides=[f"+recipe={recipe}", *open_overrides(overrides)])))


def ranges(numbers: Sequence[int]) -> str:
    """``0–7, 12``"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts) or "–"


def rows(layout: Plan, topology: Topology) -> Iterator[tuple[str, str, str, str, str, str]]:
    """By host (alike in like domains are one row): domain, GPUs, and the ranks of roles."""
    only = topology.nodes[0].id
    held: dict[str, dict[str, list[int]]] = {}
    for actor in layout.actors:
        held.setdefault(actor.node or only, {}).setdefault(actor.role, []).append(actor.index)
    booked: Counter[str] = Counter()
    for node, bundle in zip(layout.booking.nodes, layout.bundles, strict=True):
        booked[node] += int(bundle["GPU"])
    counts = {
        name: (booked[name], *sorted((role, len(found)) for role, found in roles.items() if role != "reward"))
        for name, roles in held.items()
    }
    domains = topology.domains()
    like = {
        name: tuple(sorted(str(counts[node.id]) for node in nodes if node.id in counts))
        for name, nodes in domains.items()
    }
    alike: dict[tuple[Any, ...], list[str]] = {}
    for node in topology.nodes:
        if node.id in held:
            alike.setdefault((like[node.reach], counts[node.id]), []).append(node.id)
    for names in alike.values():
        together = {role: [i for name in names for i in held[name].get(role, [])] for role in held[names[0]]}
        others = [f"{role} {ranges(found)}" for role, found in together.items() if role in ("critic", "reference")]
        gpus = topology.node(names[0]).gpus
        yield (
            span(names),
            span(list(dict.fromkeys(topology.node(name).domain or "–" for name in names))),
            f"{booked[names[0]]} of {gpus}" if gpus else "–",
            ranges(together.get("trainer", [])),
            ranges(together.get("rollout", [])),
            ", ".join(others) or "–",
        )


def span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def section(case: Case) -> str:
    topology = case.topology or expected(configured("grpo_qwen", *case.overrides).cluster)
    size = f"{topology.gpus:,} GPUs" if topology.gpus else f"{topology.cores} cores"
    where = f"{len(topology.nodes)} host{'s' if len(topology.nodes) > 1 else ''}, {size}"
    lines = [f"## {case.title[0].upper()}{case.title[1:]}", "", f"`{' '.join(case.overrides)}` ({where})", ""]
    header = ("recipe", "hosts", "NVLink domain", "GPUs used", "trainer ranks", "samplers", "others")
    body = []
    for recipe, more in RECIPES.items():
        layout = place(configured(recipe, *more, *case.overrides), topology)
        body += [(recipe, *row) for row in rows(layout, topology)]
    return "\n".join([*lines, report.table(header, body), ""])


def refusals() -> str:
    body = []
    for title, overrides in REFUSED:
        config = configured("grpo_qwen", *overrides)
        try:
            place(config, expected(config.cluster))
        except UserError as error:
            body.append((title, f"`{' '.join(overrides)}`", str(error).replace("|", "\\|").replace("\n", " ")))
        else:
            raise AssertionError(f"{title}: it was not refused")
    return "## What is refused\n\n" + report.table(("what", "overrides", "the error"), body) + "\n"


def page() -> str:
    names = (f"`{name}`" + (f" with `{' '.join(more)}`" if more else "") for name, more in RECIPES.items())
    intro = (
        "# Placement\n\n"
        "Which host and GPU every actor of three recipes gets, as a run's own functions say "
        "(`rlsys/cluster/placement.py`).\nHosts with the same numbers of actors, in domains that are alike, "
        "are one row. "
        f"Recipes: {', '.join(names)}"
    )
    last = "Made with `python -m benchmarks.placement --out docs/results`; nothing here is measured."
    return "\n\n".join([intro + ".", *(section(case).rstrip() for case in CASES), refusals().rstrip(), last]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = report.parser(__doc__).parse_args(argv)
    text = page()
    report.finish(arguments, "placement", page=text, figures={"cases": [case.title for case in CASES]})


if __name__ == "__main__":
    main()
