"""Ray's side of a placement: bundles land in the domain that they ask for, and ranks follow. The GPUs are numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import ray
from composing import run_config
from ray.cluster_utils import Cluster

from rlsys.cluster.placement import Plan, assign, place
from rlsys.cluster.session import Placement
from rlsys.cluster.topology import DOMAIN_LABEL, DOMAIN_RESOURCE, Topology, found
from rlsys.config.errors import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DOMAINS = ("a.0", "a.0", "b.0")


@pytest.fixture
def topology() -> Iterator[Topology]:
    """Two hosts of four GPUs in a domain by label, and one in a domain by resource."""
    ray.shutdown()
    cluster = Cluster()
    cluster.add_node(num_cpus=1, num_gpus=0)
    for domain in DOMAINS:
        named = {"labels": {DOMAIN_LABEL: domain}} if domain == "a.0" else {"resources": {DOMAIN_RESOURCE + domain: 9}}
        cluster.add_node(num_cpus=1, num_gpus=4, **named)
    cluster.connect()
    yield found(ray.nodes())
    ray.shutdown()
    cluster.shutdown()


def test_ranks_follow_the_bundles(topology: Topology) -> None:
    base = run_config("rollout.workers=2", "rollout.tensor_parallel=2", "cluster.placement=disaggregated")
    config = replace(base, trainer=replace(base.trainer, ranks=8, sequence_ranks=4))
    layout = place(config, topology)
    booked = Placement(layout, seconds=60, settle=lambda landed: assign(config, topology, layout.booking, landed))
    try:
        plan = booked.plan
        where = [topology.node(str(actor.node)) for actor in plan.of("trainer")]
        assert {node.reach for node in where} == {"a.0"}, "room for both groups of four in one domain"
        assert [node.id for node in where] == sorted((n.id for n in where), key=[n.id for n in topology.nodes].index)
        assert {topology.node(str(actor.node)).reach for actor in plan.of("rollout")} == {"b.0"}

        @ray.remote
        def node() -> str:
            return ray.get_runtime_context().get_node_id()

        for actor in (*plan.of("trainer")[::3], *plan.of("rollout"), *plan.of("reward")):
            options = {key: value for key, value in booked.options(actor).items() if key != "runtime_env"}
            assert ray.get(node.options(**options).remote()) == actor.node
    finally:
        booked.release()


def test_where_the_planned_domain_was_taken_meanwhile_all_go_to_another_one() -> None:
    ray.shutdown()
    cluster = Cluster()
    cluster.add_node(num_cpus=1, num_gpus=0)
    for domain in ("a.0", "a.0", "b.0", "b.0"):
        cluster.add_node(num_cpus=1, num_gpus=4, labels={DOMAIN_LABEL: domain})
    cluster.connect()
    try:
        topology = found(ray.nodes())
        base = run_config("rollout.workers=8", "cluster.placement=shared")
        config = replace(base, trainer=replace(base.trainer, ranks=8, sequence_ranks=8))
        layout = place(config, topology)
        (planned,) = {topology.node(node).reach for node in layout.booking.nodes}
        other = ray.util.placement_group([{"GPU": 1}], bundle_label_selector=[{DOMAIN_LABEL: planned}])
        assert other.wait(30)

        def settle(landed: Sequence[str]) -> Plan:
            return assign(config, topology, layout.booking, landed)

        ids = [node.id for node in topology.nodes]
        with pytest.raises(UserError, match="8 GPUs were not free"):  # some hosts are not for this run
            Placement(layout, seconds=3, settle=settle, hosts=ids[:-1])
        booked = Placement(layout, seconds=60, settle=settle, hosts=ids)
        where = [topology.node(str(actor.node)) for actor in booked.plan.of("trainer")]
        assert len({node.reach for node in where}) == 1
        assert where[0].reach != planned
        assert len({node.id for node in where}) == 2
        booked.release()
    finally:
        ray.shutdown()
        cluster.shutdown()
