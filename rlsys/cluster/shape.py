"""Whether a live cluster is what ``cluster`` says, and which of its hosts a run takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlsys.cluster.topology import Node, Topology, expected
from rlsys.config.clusters import ClusterConfig, Gb200Nvl72, LocalCluster, RayCluster
from rlsys.config.errors import UserError


def take_part(config: ClusterConfig, live: Topology) -> Topology:
    """The hosts of a live cluster that a run takes: of a kind whose shape is known as many as it has, else all.

    Raises:
        UserError: some are missing, with what is there, and which domain lacks what.
    """
    if isinstance(config, LocalCluster | RayCluster):
        return replace(live, name=config.kind)
    wanted = expected(config)
    like = wanted.nodes[0]
    fitting = [node for node in live.nodes if _fits(node, like)]
    taken = _racks(config, fitting) if isinstance(config, Gb200Nvl72) else fitting[: len(wanted.nodes)]
    if len(taken) < len(wanted.nodes):
        raise _missing(config, live, fitting, like, len(wanted.nodes))
    # What Ray does not say of a host, its kind does.
    return Topology(config.kind, tuple(replace(node, type=node.type or like.type) for node in taken))


def _fits(node: Node, like: Node) -> bool:
    """At least as many GPUs, of this kind or of none that Ray names."""
    return node.gpus >= like.gpus and (node.gpu is None or node.gpu == like.gpu)


def _racks(config: Gb200Nvl72, nodes: Sequence[Node]) -> list[Node]:
    """The trays of the racks that have enough of them; the fullest racks first."""
    racks: dict[str, list[Node]] = {}
    for node in nodes:
        if node.domain is not None:
            racks.setdefault(node.domain, []).append(node)
    full = sorted((trays for trays in racks.values() if len(trays) >= config.trays), key=len, reverse=True)
    return [tray for trays in full[: config.racks] for tray in trays[: config.trays]]


def _missing(config: ClusterConfig, live: Topology, fitting: Sequence[Node], like: Node, wanted: int) -> UserError:
    kind = f"{like.gpus} × {like.gpu.name}" if like.gpu is not None else f"{like.gpus} GPUs"
    others = [node for node in live.nodes if node not in fitting and node.gpus]
    there = ", ".join(node.address for node in fitting) or "none"
    said = f"cluster={config.kind} wants {wanted} hosts with {kind}, and {len(fitting)} are there ({there})"
    if others:
        odd = ", ".join(f"{node.address}: {node.gpus} × {node.gpu.name if node.gpu else 'GPU'}" for node in others)
        said += f"; of another kind: {odd}"
    fix = "start Ray on those that are missing (`rlsys doctor` there says what keeps them away)"
    if isinstance(config, Gb200Nvl72):
        unlabelled = [node.address for node in fitting if node.domain is None]
        counts: dict[str, int] = {}
        for node in fitting:
            if node.domain is not None:
                counts[node.domain] = counts.get(node.domain, 0) + 1
        short = [f"{domain} has {count} of {config.trays}" for domain, count in counts.items() if count < config.trays]
        if len(counts) < config.racks:
            short.append(f"{config.racks - len(counts)} of {config.racks} racks are not there at all")
        if short:
            said += f". By NVLink domain: {'; '.join(short)}"
        if unlabelled:
            said += f". In no domain, for lack of a label: {', '.join(unlabelled)}"
        fewest = min((count for count in counts.values()), default=0)
        if len(counts) >= config.racks and fewest:
            best = sorted(counts.values(), reverse=True)[config.racks - 1]
            fix += f", or do without: cluster.trays={best}"
    return UserError(f"{said}", where="cluster", fix=f"{fix}, or take what is there with cluster=ray")
