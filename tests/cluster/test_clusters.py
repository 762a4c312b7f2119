"""Who runs where on clusters of any size, as pure data: nothing here has a GPU, or needs one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from math import lcm
from pathlib import Path

import pytest
from composing import run_config
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.cluster.hardware import GPUS, NODES, compute_numa_nodes, gpu_named, numa_memory_of
from rlsys.cluster.placement import Plan, assign, place
from rlsys.cluster.shape import take_part
from rlsys.cluster.topology import (
    DOMAIN_LABEL,
    DOMAIN_RESOURCE,
    Node,
    Topology,
    expected,
    fabric_domain,
    found,
    slurm_segment,
    this_host,
    visible_devices,
)
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig

composed = cache(run_config)
TRAY, H100 = NODES["gb200_tray"], NODES["h100_node"]


def racks(trays: list[int], *, gpus: int = 4, labelled: bool = True) -> Topology:
    """Racks with so many trays each."""
    nodes = [
        Node(
            f"{rack:02d}{tray:02d}",
            f"10.0.{rack}.{tray}",
            TRAY,
            gpus,
            144,
            880.0,
            f"rack{rack}",
            {DOMAIN_LABEL: f"rack{rack}"} if labelled else {},
        )
        for rack, count in enumerate(trays)
        for tray in range(count)
    ]
    return Topology("gb200_nvl72", tuple(nodes))


def pool(sizes: list[int]) -> Topology:
    """Hosts with so many GPUs each, and no NVLink between them."""
    return Topology("gpu_pool", tuple(Node(f"n{i}", f"10.0.0.{i}", H100, g, 8 * g, 1e3) for i, g in enumerate(sizes)))


def config(
    ranks: int | None = None,
    samplers: int = 1,
    each: int = 1,
    *,
    sequence: int = 1,
    shard: int | None = None,
    placement: str = "shared",
    kl: float = 0.0,
) -> RunConfig:
    base = composed(f"cluster.placement={placement}")
    return replace(
        base,
        trainer=replace(base.trainer, ranks=ranks, sequence_ranks=sequence, shard_ranks=shard),
        rollout=replace(base.rollout, workers=samplers, tensor_parallel=each),
        algorithm=replace(base.algorithm, kl=replace(base.algorithm.kl, coef=kl)),
    )


def check(layout: Plan, settings: RunConfig, topology: Topology) -> None:
    """What holds for every plan on GPUs."""
    # Every actor once.
    names = [actor.name for actor in layout.actors]
    assert len(set(names)) == len(names)
    assert [actor.index for actor in layout.of("trainer")] == list(range(len(layout.of("trainer"))))
    assert len(layout.of("rollout")) == settings.rollout.workers
    # No host and no GPU is given out more than once.
    booked: Counter[str] = Counter()
    for node, bundle in zip(layout.booking.nodes, layout.bundles, strict=True):
        booked[node] += int(bundle["GPU"])
    assert all(count <= topology.node(node).gpus for node, count in booked.items())
    for number, bundle in enumerate(layout.bundles):
        assert sum(actor.gpus for actor in layout.actors if actor.bundle == number) <= bundle["GPU"] + 1e-9
    trainers = [layout.booking.nodes[actor.bundle] for actor in layout.of("trainer") if actor.bundle is not None]
    assert len({actor.bundle for actor in layout.of("trainer")}) == len(trainers), "NCCL wants a GPU for each rank"
    # Neighbours are on one host: going through the ranks, no host comes back.
    changes = [node for node, before in zip(trainers, [None, *trainers], strict=False) if node != before]
    assert len(changes) == len(set(changes))
    # Groups stay in one domain.
    shard = settings.trainer.shard_ranks
    group = lcm(settings.trainer.sequence_ranks, shard if shard is not None and shard < len(trainers) else 1)
    for first in range(0, len(trainers), group):
        assert len({topology.node(node).reach for node in trainers[first : first + group]}) == 1
    # Actors are bound to the host that their bundle is on.
    if len(topology.nodes) > 1:
        for actor in layout.actors:
            assert actor.node is not None
            assert actor.bundle is None or layout.booking.nodes[actor.bundle] == actor.node


clusters = st.one_of(
    st.lists(st.integers(1, 18), min_size=1, max_size=16).map(racks),
    st.lists(st.integers(1, 18), min_size=1, max_size=4).map(lambda trays: racks(trays, labelled=False)),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=12).map(pool),
)


@settings(max_examples=60, deadline=None)
@given(
    topology=clusters,
    share=st.floats(0.05, 1.0),
    sequence=st.sampled_from([1, 2, 4, 8]),
    shard=st.sampled_from([None, 2, 4, 16]),
    samplers=st.integers(1, 12),
    each=st.sampled_from([1, 2, 4]),
    placement=st.sampled_from(["shared", "disaggregated"]),
    seed=st.randoms(use_true_random=False),
)
def test_whatever_the_cluster_a_plan_keeps_groups_together_or_says_what_is_short(
    topology: Topology, share: float, sequence: int, shard: int | None, samplers: int, each: int, placement: str, seed
) -> None:
    group = lcm(sequence, shard or 1)
    ranks = max(int(topology.gpus * share) // group, 1) * group
    wanted = config(ranks, samplers, each, sequence=sequence, shard=shard, placement=placement, kl=0.1)
    try:
        layout = place(wanted, topology)
    except UserError:
        return  # too small: that this is said only of what is, is tried below
    check(layout, wanted, topology)
    # Ray may put a bundle on any host that its selector allows: ranks are given out once it is known.
    domains = {node.id: node.reach for node in topology.nodes}
    landed = list(layout.booking.nodes)
    free = {node.id: node.gpus for node in topology.nodes}
    for bundle in sorted(range(len(landed)), key=lambda b: (-layout.bundles[b]["GPU"], seed.random())):
        gpus = int(layout.bundles[bundle]["GPU"])
        fitting = [n for n, left in free.items() if domains[n] == domains[landed[bundle]] and left >= gpus]
        if not fitting:
            return  # single GPUs in the way of a sampler of several; Ray places these first too
        landed[bundle] = seed.choice(fitting)
        free[landed[bundle]] -= gpus
    check(assign(wanted, topology, layout.booking, landed), wanted, topology)


@settings(max_examples=20, deadline=None)
@given(
    hosts=st.integers(1, 16),
    per_host=st.sampled_from([4, 8]),
    trainers=st.integers(1, 15),
    each=st.sampled_from([1, 2, 4]),
)
def test_on_equal_hosts_what_adds_up_fits(hosts: int, per_host: int, trainers: int, each: int) -> None:
    topology = pool([per_host] * hosts)
    trainers = min(trainers, hosts)
    samplers = (hosts - trainers) * per_host // each
    if not samplers:
        return
    wanted = config(trainers * per_host, samplers, each, sequence=per_host, placement="disaggregated")
    layout = place(wanted, topology)
    check(layout, wanted, topology)
    assert sum(bundle["GPU"] for bundle in layout.bundles) == topology.gpus


def test_sixteen_racks_have_a_rank_on_each_gpu_and_samplers_inside_trays() -> None:
    topology = expected(composed("cluster=gb200_nvl72", "cluster.racks=16").cluster)
    assert topology.gpus == 1152
    wanted = config(sequence=8, shard=72)
    check(place(wanted, topology), wanted, topology)
    apart = config(512, 160, 4, sequence=8, placement="disaggregated")
    layout = place(apart, topology)
    check(layout, apart, topology)
    assert all(actor.gpus == 4 for actor in layout.of("rollout"))


def test_bundles_ask_for_a_domain_a_host_or_a_resource() -> None:
    labelled = place(config(16), racks([4]))
    assert labelled.booking.selectors[0] == {DOMAIN_LABEL: "rack0"}
    unlabelled = place(config(16), racks([4], labelled=False))
    assert unlabelled.booking.selectors[0] == {}
    assert f"{DOMAIN_RESOURCE}rack0" in unlabelled.bundles[0]
    assert place(config(16), pool([8, 8])).booking.selectors[8] == {"ray.io/node-id": "n1"}
    assert not any(place(config(8), pool([8])).booking.selectors), "on one host Ray has no choice"


@pytest.mark.parametrize(
    ("wanted", "topology", "where", "says"),
    [
        (config(144, sequence=144), racks([18, 18]), "trainer.sequence_ranks", "the largest has 72 GPUs"),
        (config(32, shard=16), pool([8] * 4), "trainer.shard_ranks", "the largest has 8 GPUs"),
        (config(8, 1, 8, placement="disaggregated"), racks([18]), "rollout.tensor_parallel", "the largest has 4"),
        (config(72, sequence=24), racks([17]), "trainer.ranks", "there are 68 GPUs"),
        (config(80, sequence=16), racks([10, 10, 3]), "trainer.ranks", r"1 of 12"),
        (config(8, 3, 4, placement="disaggregated"), pool([6, 6, 6]), "rollout.tensor_parallel", "need 20 GPUs"),
        (
            config(2, 4, 4, placement="disaggregated"),
            pool([6, 6, 6]),
            "trainer.ranks",
            "samplers of 4 GPUs on one host",
        ),
    ],
)
def test_what_does_not_fit_says_what_is_short(wanted: RunConfig, topology: Topology, where: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        place(wanted, topology)
    assert error.value.where == where
    assert error.value.fix


def test_trays_that_do_not_say_their_rack_are_asked_to() -> None:
    trays = [replace(node, domain=None, labels={}) for node in racks([18]).nodes]
    for nodes, asked in ((trays, True), (racks([1, 1]).nodes, False)):
        with pytest.raises(UserError, match="the largest has 4 GPUs") as error:
            place(config(8, sequence=8), Topology("ray", tuple(nodes)))
        assert (DOMAIN_LABEL in str(error.value.fix)) == asked


def test_what_would_fit_is_named_and_does() -> None:
    topology = racks([10, 10, 3])
    with pytest.raises(UserError, match=r"trainer\.ranks=64"):
        place(config(80, sequence=16), topology)
    check(place(config(64, sequence=16), topology), config(64, sequence=16), topology)


def test_gpus_that_others_hold_come_last() -> None:
    topology = pool([8, 8, 8])
    free = {"n0": 0, "n1": 3, "n2": 8}
    assert set(place(config(8), topology, free=free).booking.nodes) == {"n2"}
    assert len(place(config(24), topology, free=free).bundles) == 24, "and are waited for where there are no others"


def test_gpus_of_several_kinds_are_refused() -> None:
    mixed = Topology("ray", (*pool([8]).nodes, *racks([2]).nodes))
    with pytest.raises(UserError, match="8 H100 and 8 GB200"):
        place(config(8), mixed)


# --- one memory, and a pair ---


def test_on_unified_memory_nobody_sleeps_and_a_pair_shares_no_model() -> None:
    one, pair = (composed(f"cluster={kind}") for kind in ("gb10", "gb10_pair"))
    assert one.model.attention == pair.model.attention == "sdpa"
    layout = place(pair, expected(pair.cluster))
    assert layout.of("trainer")[0].node != layout.of("rollout")[0].node
    assert {actor.gpus for actor in layout.of("rollout")} == {1.0}
    for overrides, where in (
        (["cluster=gb10", "cluster.placement=colocated"], "cluster.placement"),
        (["cluster=gb10_pair", "cluster.placement=shared"], "cluster.placement"),
        (["cluster=gb10_pair", "rollout.tensor_parallel=2"], "rollout.tensor_parallel"),
        (["cluster=gb10_pair", "trainer.ranks=2"], "cluster.placement"),
    ):
        refused = composed(*overrides)
        with pytest.raises(UserError) as error:
            place(refused, expected(refused.cluster))
        assert error.value.where == where


# --- hosts without GPUs ---


@settings(max_examples=40, deadline=None)
@given(
    cores=st.lists(st.integers(0, 64), min_size=1, max_size=9).filter(any),
    ranks=st.integers(1, 9),
    samplers=st.integers(1, 9),
    placement=st.sampled_from(["shared", "colocated", "disaggregated"]),
)
def test_cores_are_spread_over(cores: list[int], ranks: int, samplers: int, placement: str) -> None:
    topology = Topology("ray", tuple(Node(f"n{i}", f"10.0.0.{i}", None, 0, c, 1.0) for i, c in enumerate(cores)))
    wanted = config(ranks, samplers, placement=placement, kl=0.1)
    layout = place(wanted, topology)
    assert not layout.bundles
    assert (len(layout.of("trainer")), len(layout.of("rollout"))) == (ranks, samplers)
    at = [actor.node for actor in layout.of("trainer")]
    assert at == sorted(at, key=lambda node: str(node)), "neighbours are on one host"
    if len(cores) > 1:
        assert all(topology.node(str(actor.node)).cores for actor in layout.actors), "a host without cores has none"
    hosts = sum(map(bool, cores))
    if placement == "disaggregated" and hosts > 1:
        assert not set(at) & {actor.node for actor in layout.of("rollout")}
    if placement == "shared" and len(set(cores)) == 1:
        assert len(set(at)) == min(ranks, hosts), "all hosts take part"
    for node in topology.nodes:
        trainers = [actor for actor in layout.of("trainer") if actor.node == node.id]
        assert sum(actor.threads for actor in trainers) <= max(node.cores, len(trainers))


# --- what is there, and what should be ---


def ray_node(address: str, gpus: float = 0, kind: str = "", clique: str = "", alive: bool = True, **more: float):
    resources = {"CPU": 8.0, **({"GPU": gpus} if gpus else {}), **({f"accelerator_type:{kind}": 1.0} if kind else {})}
    labels = {DOMAIN_LABEL: clique} if clique else {}
    return {"Alive": alive, "NodeID": f"id-{address}", "NodeManagerAddress": address, "Resources": resources | more} | {
        "Labels": labels
    }


def test_a_live_cluster_is_read_from_ray() -> None:
    there = found(
        [
            ray_node("10.0.0.10", 4, "GB200", "a.1"),
            ray_node("10.0.0.9", 4, "GB200", "a.1"),
            ray_node("10.0.0.7", 4, "GB200", **{f"{DOMAIN_RESOURCE}b.0": 1000.0}),
            ray_node("10.0.0.8", 8, "H100", alive=False),
            ray_node("10.0.0.1"),
        ]
    )
    assert [node.address for node in there.nodes] == ["10.0.0.1", "10.0.0.9", "10.0.0.10", "10.0.0.7"]
    assert list(there.domains()) == ["a.1", "b.0"], "a head without GPUs takes no part"
    assert there.gpus == 12
    assert all(node.type == TRAY for node in there.nodes if node.gpus)


def test_a_missing_tray_is_told_with_its_rack_and_the_way_without_it() -> None:
    cluster = composed("cluster=gb200_nvl72", "cluster.racks=2").cluster
    live = [ray_node(f"10.0.{r}.{t}", 4, "GB200", f"rack{r}") for r in (0, 1) for t in range(18 - r)]
    with pytest.raises(UserError, match=r"rack1 has 17 of 18") as error:
        take_part(cluster, found(live))
    assert "cluster.trays=17" in str(error.value.fix)
    fewer = composed("cluster=gb200_nvl72", "cluster.racks=2", "cluster.trays=16").cluster
    assert Counter(node.domain for node in take_part(fewer, found(live)).nodes) == {"rack0": 16, "rack1": 16}


def test_hosts_of_another_kind_do_not_count_and_are_named() -> None:
    cluster = composed("cluster=gpu_pool", "cluster.nodes=2").cluster
    live = [ray_node("10.0.0.1"), ray_node("10.0.0.2", 8, "H100"), ray_node("10.0.0.3", 8, "A100")]
    with pytest.raises(UserError, match=r"1 are there \(10\.0\.0\.2\); of another kind: 10\.0\.0\.3: 8 × A100"):
        take_part(cluster, found(live))
    enough = take_part(cluster, found([*live, ray_node("10.0.0.4", 8), ray_node("10.0.0.5", 8, "H100")]))
    assert [node.address for node in enough.nodes] == ["10.0.0.2", "10.0.0.4"]
    assert enough.nodes[1].type == H100, "what Ray does not say its kind does"
    assert take_part(composed("cluster=ray").cluster, found(live)).gpus == 16


def test_slurm_s_page_says_the_same_segments() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "slurm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+ and more|\d+ to \d+|fewer) \| `--segment=(\d+)` \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for gpus, segment in rows:
        for count in (int(number) for number in re.findall(r"\d+", gpus) or ["31"]):
            assert slurm_segment(count) == int(segment)


@pytest.mark.parametrize(("gpus", "segment"), [(4, 1), (31, 1), (32, 4), (124, 4), (128, 16), (1152, 16)])
def test_slurm_s_segment_follows_the_job_s_size(gpus: int, segment: int) -> None:
    assert slurm_segment(gpus) == segment


def test_the_fabric_names_its_domain() -> None:
    said = """
    Fabric
        State                                          : Completed
        Status                                         : Success
        CliqueId                                       : 32766
        ClusterUUID                                    : 0A1B2C3D-1111-2222-3333-444455556666
    """
    assert fabric_domain(said) == "0a1b2c3d-1111-2222-3333-444455556666.32766"
    nobody = said.replace("0A1B2C3D-1111-2222-3333-444455556666", "00000000-0000-0000-0000-000000000000")
    assert fabric_domain(nobody) is None
    assert fabric_domain("Fabric\n  CliqueId : N/A\n  ClusterUUID : N/A") is None


def test_names_of_gpus_and_memory_without_a_cpu() -> None:
    assert gpu_named("NVIDIA GB200") is GPUS["GB200"]
    assert gpu_named("NVIDIA B200") is GPUS["B200"]
    assert gpu_named("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert gpu_named("Tesla T4") is None
    assert compute_numa_nodes({0: "0-71\n", 1: "72-143\n", 2: "\n", 10: ""}) == [0, 1]


def test_memory_of_a_tray_s_gpus_is_not_the_host_s(tmp_path: Path) -> None:
    for number, (cpus, total, free) in enumerate(
        [("0-71", 480, 400), ("72-143", 480, 300), ("", 184, 180), ("", 7, 1)]
    ):
        node = tmp_path / f"node{number}"
        node.mkdir()
        (node / "cpulist").write_text(f"{cpus}\n")
        (node / "meminfo").write_text(f"Node {number} MemTotal: {total} kB\nNode {number} MemFree:   {free} kB\n")
    assert numa_memory_of(GPUS["GB200"], tmp_path) == (191 * 1024, 181 * 1024)
    assert numa_memory_of(GPUS["H100"], tmp_path) == numa_memory_of(None, tmp_path) == (0, 0)


@pytest.mark.parametrize(
    ("visible", "left"),
    [(None, [0, 1, 2, 3]), ("", []), ("-1", []), ("2, 0", [2, 0]), ("1,7,0", [1]), ("GPU-aa,GPU-bb", [0, 1])],
)
def test_devices_that_the_environment_leaves(
    visible: str | None, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible_devices(4, visible) == left
    (tmp_path / "meminfo").write_text("MemTotal:       65536 kB\n")
    for number in range(4):
        gpu = tmp_path / "driver" / "nvidia" / "gpus" / f"0000:0{number}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (host,) = this_host(tmp_path).nodes
    assert (host.gpus, host.gpu) == (len(left), GPUS["H100"] if left else None)
