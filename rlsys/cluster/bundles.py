"""How many GPUs are booked in which NVLink domain: pure functions of the configuration and the cluster's hosts.

Groups of ranks that exchange activations or whole layers in every pass stay inside one domain; data parallel ranks,
which exchange gradients once a step, may be in several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.cluster.hardware import NODES
from rlsys.cluster.topology import DOMAIN_LABEL, DOMAIN_RESOURCE, Node, Topology
from rlsys.config.errors import UserError
from rlsys.config.sampler import sampler_ranks
from rlsys.config.schema import RunConfig

_NODE_ID = "ray.io/node-id"  # a label that Ray gives every node
_TOKEN = 0.001  # of a domain's custom resource: enough to be placed by it, and too little to use it up


@dataclass(frozen=True)
class Booking:
    """Bundles of a placement group. The first ``ranks`` have a trainer rank each, those up to ``singles`` a sampler
    alone, the others a sampler of several GPUs or of its own.

    nodes: by bundle, the host that it is meant for; selectors: the labels that Ray is to look for.
    """

    bundles: tuple[dict[str, float], ...] = ()
    selectors: tuple[dict[str, str], ...] = ()
    nodes: tuple[str, ...] = ()
    ranks: int = 0
    singles: int = 0

    @property
    def one_domain(self) -> bool:
        """Whether all bundles ask for one NVLink domain, by the label that its hosts have."""
        asked = {selector.get(DOMAIN_LABEL) for selector in self.selectors}
        return len(asked) == 1 and None not in asked


def check_hosts(config: RunConfig, topology: Topology) -> None:
    """What holds for all hosts together.

    Raises:
        UserError: GPUs of several kinds, samplers larger than a host, or a placement that the memory does not allow.
    """
    kinds: dict[str, int] = {}
    for node in topology.nodes:
        if node.gpus and node.gpu is not None:
            kinds[node.gpu.name] = kinds.get(node.gpu.name, 0) + node.gpus
    if len(kinds) > 1:
        there = " and ".join(f"{count} {name}" for name, count in kinds.items())
        raise UserError(
            f"the cluster has {there}, and ranks of one run want GPUs of one kind: all wait for the slowest",
            where="cluster",
            fix="choose one kind, such as cluster=gpu_pool cluster.gpu=… cluster.nodes=…, or leave the others out",
        )
    each = sampler_ranks(config.rollout)
    host = max((node.gpus for node in topology.nodes), default=0)
    if each > host and topology.gpus and len(topology.nodes) > 1:
        raise UserError(
            f"a sampler of {each} GPUs has its processes on one host, and the largest has {host}",
            where="rollout.tensor_parallel",
            fix=f"set rollout.tensor_parallel × rollout.pipeline_parallel to {host} or less, and more rollout.workers",
        )
    placement = config.cluster.placement
    if topology.unified and placement == "colocated":
        raise UserError(
            "CPU and GPU have one memory here: what sleeps or is offloaded gives nothing back to the other",
            where="cluster.placement",
            fix="set cluster.placement=shared, and divide the memory with rollout.gpu_memory_fraction",
        )
    if config.cluster.kind == "gb10_pair" and placement != "disaggregated":
        raise UserError(
            "of a pair one trains and the other samples: its link is too slow for ranks of one model on both",
            where="cluster.placement",
            fix="leave cluster.placement=disaggregated, or use one alone with cluster=gb10",
        )


def book(
    config: RunConfig,
    topology: Topology,
    *,
    singles: int,
    ranks: int,
    own: int,
    free: Mapping[str, int] | None = None,
) -> Booking:
    """Bundles for ``ranks`` trainer ranks, ``singles`` GPUs that these and samplers share, and ``own`` samplers apart.
    As few domains as possible are used, and the trainer's GPUs are in the first of them.

    Args:
        free: by host, GPUs that nobody holds now: tried first, before those that have to be waited for.

    Raises:
        UserError: a group is larger than the largest domain, or they do not fit side by side.
    """
    each, group = sampler_ranks(config.rollout), _group(config, ranks)
    _check_group(config, topology, group)
    totals = {node.id: node.gpus for node in topology.nodes}
    wanted = _Wanted(ranks, singles - ranks, own, each, group)
    for there in ([{**totals, **free}] if free is not None else []) + [totals]:
        for trainer_first in (True, False):
            if (nodes := _fill(topology, there, wanted, trainer_first=trainer_first)) is not None:
                counts = [1.0] * singles + [float(each)] * own
                asked = [
                    _asked(topology, topology.node(name), count) for name, count in zip(nodes, counts, strict=True)
                ]
                return Booking(tuple(b for b, _ in asked), tuple(s for _, s in asked), tuple(nodes), ranks, singles)
    raise _short(topology, totals, wanted)


@dataclass(frozen=True)
class _Wanted:
    """ranks: of the trainer, in groups of ``group``; more: single GPUs for samplers; own: samplers of ``each`` GPUs."""

    ranks: int
    more: int
    own: int
    each: int
    group: int


def _group(config: RunConfig, ranks: int) -> int:
    """Neighbouring trainer ranks that have to be in one domain. Weights that are spread over all ranks cross domains:
    that is what whoever chose it wants."""
    trainer = config.trainer
    spread = trainer.shard_ranks if trainer.backend == "fsdp" and trainer.shard_ranks is not None else ranks
    return math.lcm(trainer.sequence_ranks, spread if spread < ranks else 1)


def _check_group(config: RunConfig, topology: Topology, group: int) -> None:
    domain = max(sum(node.gpus for node in nodes) for nodes in topology.domains().values())
    if group > domain:
        key = "trainer.sequence_ranks" if config.trainer.sequence_ranks > domain else "trainer.shard_ranks"
        fix = f"set {key} to a divisor of {domain}"
        if any(node.domain is None and node.type is NODES["gb200_tray"] for node in topology.nodes):
            fix += f", or start Ray on each tray with its label {DOMAIN_LABEL}: some do not say which rack they are in"
        raise UserError(
            f"{group} neighbouring ranks hold rows or weights together and have to be in one NVLink domain, of which "
            f"the largest has {domain} GPUs",
            where=key,
            fix=fix,
        )


def _fill(topology: Topology, there: Mapping[str, int], wanted: _Wanted, *, trainer_first: bool) -> list[str] | None:
    """By bundle, its host; None: they do not fit in this order."""
    left = dict(there)
    domains = _ordered(topology, left, wanted)

    def trainer() -> list[str]:
        result: list[str] = []
        for nodes in domains:
            room = sum(left[node.id] for node in nodes) // wanted.group * wanted.group
            result += _take(nodes, left, min(room, wanted.ranks - len(result)))
        return result

    def samplers() -> list[str]:
        result: list[str] = []
        for node in [node for nodes in reversed(domains) for node in reversed(nodes)]:
            while left[node.id] >= wanted.each and len(result) < wanted.own:
                left[node.id] -= wanted.each
                result.append(node.id)
        return result[::-1]

    if trainer_first:
        ranks, own = trainer(), samplers()
    else:
        own, ranks = samplers(), trainer()
    more = _take([node for nodes in domains for node in nodes], left, wanted.more)
    complete = (len(ranks), len(more), len(own)) == (wanted.ranks, wanted.more, wanted.own)
    return [*ranks, *more, *own] if complete else None


def _take(nodes: Sequence[Node], left: dict[str, int], count: int) -> list[str]:
    result: list[str] = []
    for node in nodes:
        taken = min(left[node.id], count - len(result))
        left[node.id] -= taken
        result += [node.id] * taken
    return result


def _ordered(topology: Topology, left: Mapping[str, int], wanted: _Wanted) -> list[tuple[Node, ...]]:
    """Domains in the order in which they are filled: the smallest that has room for everything, or else the largest
    first."""
    domains = [nodes for nodes in topology.domains().values() if any(node.gpus for node in nodes)]
    room = {id(nodes): sum(left[node.id] for node in nodes) for nodes in domains}
    all_of_it = wanted.ranks + wanted.more + wanted.own * wanted.each
    enough = [nodes for nodes in domains if room[id(nodes)] >= all_of_it]
    if enough:
        best = min(enough, key=lambda nodes: room[id(nodes)])
        return [best, *(nodes for nodes in domains if nodes is not best)]
    return sorted(domains, key=lambda nodes: -room[id(nodes)])


def _asked(topology: Topology, node: Node, gpus: float) -> tuple[dict[str, float], dict[str, str]]:
    """A bundle, and the labels of the hosts that it may be on: any of the domain."""
    if len(topology.nodes) == 1:
        return {"GPU": gpus}, {}
    if node.domain is None:
        return {"GPU": gpus}, {_NODE_ID: node.id}
    if node.labels.get(DOMAIN_LABEL) == node.domain:
        return {"GPU": gpus}, {DOMAIN_LABEL: node.domain}
    return {"GPU": gpus, f"{DOMAIN_RESOURCE}{node.domain}": _TOKEN}, {}


def _short(topology: Topology, there: Mapping[str, int], wanted: _Wanted) -> UserError:
    """What does not fit side by side, and what would."""
    domains = [nodes for nodes in topology.domains().values() if any(node.gpus for node in nodes)]
    rooms = [sum(there[node.id] for node in nodes) for nodes in domains]
    parts = [f"{wanted.ranks} trainer ranks" + (f" in groups of {wanted.group}" if wanted.group > 1 else "")]
    if wanted.own:
        parts.append(f"{wanted.own} samplers of {wanted.each} GPUs on one host each")
    best = 0
    for ranks in range(wanted.ranks - 1, 0, -1):
        fewer = _Wanted(ranks, wanted.more, wanted.own, wanted.each, wanted.group)
        if ranks % wanted.group == 0 and any(
            _fill(topology, there, fewer, trainer_first=first) is not None for first in (True, False)
        ):
            best = ranks
            break
    sizes = ", ".join(f"{rooms.count(size)} of {size}" for size in sorted(set(rooms), reverse=True))
    fix = f"set trainer.ranks={best}" if best else "lower rollout.workers or rollout.tensor_parallel"
    return UserError(
        f"{' and '.join(parts)} do not fit into NVLink domains of these GPUs: {sizes}",
        where="trainer.ranks",
        fix=f"{fix}, or a smaller group (trainer.sequence_ranks, trainer.shard_ranks)" if wanted.group > 1 else fix,
    )
