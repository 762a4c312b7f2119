"""Which actors run, and on what: pure functions of the configuration and the cluster's hosts.

Bundles of GPUs are booked by domain (``bundles.py``), Ray says on which hosts they landed, and only then ranks are
given out (:func:`assign`), so that neighbouring ranks are on one host: Ray keeps no order of bundles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlsys.algorithms.requirements import needs_critic, needs_reference_worker
from rlsys.cluster.bundles import Booking, book, check_hosts
from rlsys.cluster.topology import Node, Topology, one_host
from rlsys.config.errors import UserError
from rlsys.config.sampler import sampler_ranks
from rlsys.config.schema import RunConfig

# Shares of a GPU that its actors take turns on. Ray books them; memory is bounded by rollout.gpu_memory_fraction on the
# sampler's side.
_GPU_SHARE = {"trainer": 0.4, "critic": 0.1, "rollout": 0.4, "reference": 0.1}


@dataclass(frozen=True)
class ActorSpec:
    """One Ray actor. index: its rank among those of its role; bundle: index of the placement-group bundle, None on a
    CPU; env: its environment; node: the host that it is bound to, None: any."""

    role: str
    index: int
    gpus: float = 0.0
    bundle: int | None = None
    threads: int = 1
    env: dict[str, str] = field(default_factory=dict)
    node: str | None = None

    @property
    def name(self) -> str:
        return f"{self.role} worker {self.index}"


@dataclass(frozen=True)
class Plan:
    """All actors of a run, and the bundles (GPUs each) that they are placed into. booking: how these are asked for."""

    actors: tuple[ActorSpec, ...]
    bundles: tuple[dict[str, float], ...]
    booking: Booking = field(default_factory=Booking)

    def of(self, role: str) -> list[ActorSpec]:
        return [actor for actor in self.actors if actor.role == role]


def plan(config: RunConfig, *, gpus: int, cores: int) -> Plan:
    """:func:`place` on one host."""
    return place(config, one_host(gpus=gpus, cores=cores))


def place(
    config: RunConfig,
    topology: Topology,
    *,
    env: Mapping[str, Mapping[str, str]] | None = None,
    free: Mapping[str, int] | None = None,
) -> Plan:
    """Assigns actors to hosts and GPUs, trainer rank i and rollout worker i on GPU i, so that as many are needed as the
    more numerous of the two; ``disaggregated``, samplers have GPUs of their own. Without GPUs the same with cores. A
    sampler of several GPUs has them to itself in any case, on one host: Ray can share one GPU, not several at once.
    Ranks that share rows or weights (``trainer.sequence_ranks``, ``trainer.shard_ranks``) stay in one NVLink domain.

    Args:
        env: by host, what its actors have in their environment besides.
        free: by host, GPUs that nobody holds now; these come first.

    Raises:
        UserError: more trainer ranks or rollout workers than GPUs, GPUs of several kinds, groups of ranks for which no
            domain is large enough, samplers of several GPUs that should take turns, or ranks that do not divide.
    """
    check_hosts(config, topology)
    gpus, each = topology.gpus, sampler_ranks(config.rollout)
    own = each * config.rollout.workers if gpus and _apart(config) else 0  # GPUs that only samplers use
    ranks = config.trainer.ranks or max(gpus - own, 1)
    _check_room(config, gpus, ranks, own, each)
    if ranks % config.trainer.sequence_ranks:
        raise UserError(
            f"{ranks} trainer ranks cannot be divided into groups of {config.trainer.sequence_ranks} that share a row",
            where="trainer.sequence_ranks",
            fix=f"choose a divisor of {ranks}, or set trainer.ranks",
        )
    if not gpus:
        return Plan(tuple(_on_cores(config, topology, ranks, env or {})), ())
    singles = ranks if own else max(ranks, config.rollout.workers)
    booking = book(config, topology, singles=singles, ranks=ranks, own=config.rollout.workers if own else 0, free=free)
    return assign(config, topology, booking, booking.nodes, env=env)


def assign(
    config: RunConfig,
    topology: Topology,
    booking: Booking,
    landed: Sequence[str],
    *,
    env: Mapping[str, Mapping[str, str]] | None = None,
) -> Plan:
    """Actors for bundles whose hosts are known: ranks go through domains, in these through hosts.

    Args:
        landed: by bundle, the id of its host.
        env: as :func:`place` takes it.
    """
    domains = {node.id: number for number, nodes in enumerate(topology.domains().values()) for node in nodes}
    hosts = {node.id: number for number, node in enumerate(topology.nodes)}
    order = sorted(range(len(landed)), key=lambda b: (domains[landed[b]], hosts[landed[b]], b))
    ranks = booking.ranks
    training = [bundle for bundle in order if bundle < ranks]
    more = [bundle for bundle in order if ranks <= bundle < booking.singles]
    several = [bundle for bundle in order if bundle >= booking.singles]
    own = bool(several)
    at = {"trainer": training, "critic": training, "reference": training[:1], "rollout": several or [*training, *more]}
    trainers = Counter(landed[bundle] for bundle in at["trainer"])
    samplers = Counter(landed[bundle] for bundle in at["rollout"][: config.rollout.workers])
    actors = []
    for role, count in _counts(config, ranks):
        for index in range(count):
            bundle = at[role][index]
            node = topology.node(landed[bundle])
            sharing = samplers[node.id] if role == "rollout" else max(trainers[node.id], 1)
            threads = config.cluster.threads or max(1, node.cores // sharing)
            gpus = booking.bundles[bundle]["GPU"] if role == "rollout" and own else _GPU_SHARE[role]
            actors.append(
                ActorSpec(role, index, gpus, bundle, threads, _env(env, node.id, threads), _bound(topology, node.id))
            )
    first = topology.node(landed[training[0]]).id
    actors.append(ActorSpec("reward", 0, env=_env(env, first, 1), node=_bound(topology, first)))
    return Plan(tuple(actors), booking.bundles, replace(booking, nodes=tuple(landed)))


def _on_cores(
    config: RunConfig, topology: Topology, ranks: int, env: Mapping[str, Mapping[str, str]]
) -> list[ActorSpec]:
    """Actors of a cluster without GPUs: each role in a row over all hosts, as many on each as its cores are worth;
    ``disaggregated``, samplers on hosts behind the trainer's, where there is more than one."""
    nodes = [node for node in topology.nodes if node.cores] or list(topology.nodes)
    workers, split = config.rollout.workers, config.cluster.placement == "disaggregated"
    training = sampling = nodes
    if split and len(nodes) > 1:
        cut = min(max(round(len(nodes) * ranks / (ranks + workers)), 1), len(nodes) - 1)
        training, sampling = nodes[:cut], nodes[cut:]
    trainer = _spread(training, ranks)
    rollout = [len(nodes) - len(sampling) + host for host in _spread(sampling, workers)]
    at = {"trainer": trainer, "critic": trainer, "rollout": rollout, "reference": trainer[-1:]}
    trainers, samplers = Counter(trainer), Counter(rollout)
    actors = []
    for role, count in _counts(config, ranks):
        for index in range(count):
            host = at[role][index]
            cores = nodes[host].cores
            sharing = max(trainers[host], 1) + split * samplers[host]
            if role == "rollout":
                sharing = trainers[host] + samplers[host] if split else samplers[host]
            threads = config.cluster.threads or max(1, cores // sharing)
            node = nodes[host].id
            actors.append(ActorSpec(role, index, 0.0, None, threads, _env(env, node, threads), _bound(topology, node)))
    actors.append(ActorSpec("reward", 0, env=_env(env, nodes[0].id, 1), node=_bound(topology, nodes[0].id)))
    return actors


def _spread(nodes: Sequence[Node], count: int) -> list[int]:
    """By actor, the index of its host: in a row, in proportion to the hosts' cores."""
    cores = [max(node.cores, 1) for node in nodes]
    total, result, host, filled = sum(cores), list[int](), 0, cores[0]
    for index in range(count):
        middle = (index + 0.5) * total / count
        while middle >= filled and host < len(cores) - 1:
            host += 1
            filled += cores[host]
        result.append(host)
    return result


def _counts(config: RunConfig, ranks: int) -> list[tuple[str, int]]:
    return [
        ("trainer", ranks),
        ("critic", ranks if needs_critic(config) else 0),
        ("rollout", config.rollout.workers),
        ("reference", int(needs_reference_worker(config))),
    ]


def _env(env: Mapping[str, Mapping[str, str]] | None, node: str, threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), **(env or {}).get(node, {})}


def _bound(topology: Topology, node: str) -> str | None:
    """An actor of a lone host is bound to nothing: Ray has no choice."""
    return node if len(topology.nodes) > 1 else None


def _apart(config: RunConfig) -> bool:
    return sampler_ranks(config.rollout) > 1 or config.cluster.placement == "disaggregated"


def _check_room(config: RunConfig, gpus: int, ranks: int, own: int, each: int) -> None:
    if own and each > 1 and config.cluster.placement == "colocated":
        raise UserError(
            f"a sampler of {each} GPUs has them to itself, and takes no turns with a trainer",
            where="cluster.placement",
            fix="set cluster.placement=disaggregated, or more rollout.workers of one GPU each",
        )
    if own and ranks + own > gpus:
        raise UserError(
            f"{config.rollout.workers} samplers of {each} GPUs and {ranks} trainer ranks need {ranks + own} GPUs, and "
            f"there are {gpus}",
            where="rollout.tensor_parallel" if each > 1 else "cluster.placement",
            fix="lower rollout.tensor_parallel, rollout.pipeline_parallel, rollout.workers or trainer.ranks"
            if each > 1
            else "set cluster.placement=colocated, or lower rollout.workers or trainer.ranks",
        )
    for key, wanted in (("trainer.ranks", ranks), ("rollout.workers", config.rollout.workers)):
        if gpus and wanted > gpus:
            raise UserError(f"{key}={wanted}, but there are {gpus} GPUs", where=key, fix=f"set {key}={gpus} or less")
