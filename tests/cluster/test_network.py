"""Which interface hosts talk through, and the environment that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import run_config

from rlsys.cluster.network import HostLook, Interface, chosen, look, network_env
from rlsys.cluster.unified import check_offload, check_unified
from rlsys.config.errors import UserError

GIB = 2**30
ADDRESSES = {"a": "192.168.1.1", "b": "192.168.1.2"}


def spark(number: int, *more: Interface, **given: str) -> HostLook:
    """A DGX Spark with its management interface, of which Ray knows the address, and one of its fast port's two."""
    return HostLook(
        (
            Interface("enP7s7", f"192.168.1.{number}/24", 1000),
            Interface("enp1s0f1np1", f"169.254.3.{number}/16", 100_000),
            Interface("docker0", f"172.17.0.{number}/16", 10_000, physical=False),
            *more,
        ),
        {"rocep1s0f1": 100_000, "roceP2p1s0f1": 100_000},
        "/usr/local/cuda/bin/ptxas",
        given,
    )


def test_the_fast_net_of_all_hosts_is_taken_and_both_of_the_ports_devices() -> None:
    looks = {"a": spark(1), "b": spark(2)}
    found = chosen(looks, ADDRESSES)
    assert {each.name for each in found.values()} == {"enp1s0f1np1"}
    env = network_env(looks["a"], found["a"], unified=True, gpus=True)
    assert env == {
        "GLOO_SOCKET_IFNAME": "enp1s0f1np1",
        "NCCL_SOCKET_IFNAME": "=enp1s0f1np1",
        "NCCL_IB_HCA": "=roceP2p1s0f1,rocep1s0f1",
        "NCCL_NET_GDR_LEVEL": "LOC",
        "NCCL_NET_GDR_C2C": "0",
        "NCCL_DMABUF_ENABLE": "0",
        "TRITON_PTXAS_PATH": "/usr/local/cuda/bin/ptxas",
    }


def test_a_net_that_one_host_is_not_in_is_not_taken() -> None:
    alone = Interface("enp1s0f0np0", "10.9.0.1/24", 200_000)
    other = HostLook((Interface("eno1", "192.168.1.2/24", 1000),), {}, None, {})
    found = chosen({"a": spark(1, alone), "b": other}, ADDRESSES)
    assert {host: each.name for host, each in found.items()} == {"a": "enP7s7", "b": "eno1"}
    assert network_env(other, found["b"], unified=False, gpus=False) == {"GLOO_SOCKET_IFNAME": "eno1"}


def test_ray_s_address_decides_between_nets_that_are_equally_fast_or_do_not_say() -> None:
    hosts = {
        host: HostLook((Interface("x", f"10.1.0.{n}/24", 0), Interface("y", f"192.168.1.{n}/24", 0)), {}, None, {})
        for n, host in enumerate("ab", 1)
    }
    assert {each.name for each in chosen(hosts, ADDRESSES).values()} == {"y"}
    assert chosen({"a": hosts["a"], "b": hosts["b"]}, {"a": "8.8.8.8", "b": "8.8.4.4"}) == {}


def test_what_a_host_was_started_with_stands() -> None:
    mine = spark(1, NCCL_SOCKET_IFNAME="mine")
    env = network_env(mine, mine.interfaces[1], unified=False, gpus=True)
    assert "NCCL_SOCKET_IFNAME" not in env
    assert env["GLOO_SOCKET_IFNAME"] == "enp1s0f1np1"
    assert not {name for name in env if name.startswith(("NCCL_NET", "NCCL_DMABUF", "TRITON"))}


def test_devices_are_those_whose_link_is_up(tmp_path: Path) -> None:
    for device, port, state, speed in (("mlx5_0", "eth0", "up", "200000"), ("mlx5_1", "eth1", "down", "-1")):
        (tmp_path / "infiniband" / device / "device" / "net" / port).mkdir(parents=True)
        (tmp_path / "net" / port).mkdir(parents=True)
        (tmp_path / "net" / port / "operstate").write_text(state)
        (tmp_path / "net" / port / "speed").write_text(speed)
    here = look(tmp_path, tmp_path / "no-ptxas")
    assert (here.rdma, here.ptxas) == ({"mlx5_0": 200_000}, None)
    assert not any(each.ip.startswith("127.") for each in here.interfaces)


# --- one memory ---


@pytest.mark.parametrize(("fraction", "largest"), [(0.4, None), (0.7, "0.65")])
def test_the_sampler_has_what_the_trainer_leaves_of_unified_memory(fraction: float, largest: str | None) -> None:
    config = run_config("cluster=gb10", f"rollout.gpu_memory_fraction={fraction}")
    found = {"every phase": {"the trainer's weights": 24 * GIB, "the sampler's cache": 50 * GIB}}
    if largest is None:
        check_unified(config, found, 120 * GIB)
        return
    with pytest.raises(UserError) as error:
        check_unified(config, found, 120 * GIB)
    assert error.value.fix == f"set rollout.gpu_memory_fraction={largest}"


@pytest.mark.parametrize("override", ["trainer.offload=all", "trainer.activations=offload"])
def test_nothing_is_offloaded_where_there_is_no_other_memory(override: str) -> None:
    config = run_config("cluster=gb10", override)
    with pytest.raises(UserError, match="moves nothing") as error:
        check_unified(config, {}, 120 * GIB)
    assert error.value.where == override.partition("=")[0]
    with pytest.raises(UserError, match="moves nothing"):
        check_offload(config)
