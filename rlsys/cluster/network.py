"""Which network interface a host's actors talk through, and what has to be in their environment for it: looked up on
each host (:func:`look`), decided as pure functions.

Left alone, gloo asks what address the host's own name has, and NCCL takes the first interface that is up: often the one
that the host is managed by.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B  # linux/sockios.h
PTXAS = Path("/usr/local/cuda/bin/ptxas")
_OURS = ("NCCL_", "GLOO_", "TRITON_PTXAS_PATH", "UCX_")

# There is no GPUDirect RDMA on a GB10, by peer memory or DMA-BUF: NCCL stages through host memory, which is the GPU's.
_GB10 = {"NCCL_NET_GDR_LEVEL": "LOC", "NCCL_NET_GDR_C2C": "0", "NCCL_DMABUF_ENABLE": "0"}


@dataclass(frozen=True)
class Interface:
    """A network interface that is up and has an IPv4 address.

    address: with the length of its net's prefix (``10.0.0.1/24``). mbps: of its link; 0: it does not say.
    physical: it is a device, and no bridge, tunnel or container's.
    """

    name: str
    address: str
    mbps: int = 0
    physical: bool = True

    @property
    def net(self) -> str:
        return str(ipaddress.ip_interface(self.address).network)

    @property
    def ip(self) -> str:
        return str(ipaddress.ip_interface(self.address).ip)


@dataclass(frozen=True)
class HostLook:
    """What a host says of itself. interfaces: see there; rdma: by RDMA device with a link that is up, its interface's
    Mb/s; ptxas: path of the CUDA toolkit's; given: variables about all this in the environment that Ray was started
    in."""

    interfaces: tuple[Interface, ...]
    rdma: Mapping[str, int]
    ptxas: str | None
    given: Mapping[str, str]


def look(sys: Path = Path("/sys/class"), ptxas: Path = PTXAS) -> HostLook:
    """This host.

    Args:
        sys: where the kernel says what devices there are.
    """
    interfaces = []
    for _, name in socket.if_nameindex():  # /sys may be another network namespace's, this is not
        address = _address(name)
        if address is not None and not ipaddress.ip_interface(address).is_loopback:
            there = sys / "net" / name
            interfaces.append(Interface(name, address, _mbps(there), is_physical(there)))
    rdma = {}
    for device in sorted((sys / "infiniband").glob("*")):
        speeds = [_mbps(sys / "net" / port.name) for port in (device / "device" / "net").glob("*")]
        if any(speeds):
            rdma[device.name] = max(speeds)
    given = {key: value for key, value in os.environ.items() if key.startswith(_OURS)}
    return HostLook(tuple(interfaces), rdma, str(ptxas) if ptxas.exists() else None, given)


def chosen(looks: Mapping[str, HostLook], addresses: Mapping[str, str]) -> dict[str, Interface]:
    """By host, the interface that all of them reach each other by: of the fastest net that every host is in with a
    device of its own; else that of Ray's address. Hosts where neither is found are left out.

    Args:
        addresses: by host, the one that Ray knows it by.
    """
    of_ray = {
        host: next((each for each in look.interfaces if each.ip == addresses[host]), None)
        for host, look in looks.items()
    }
    slowest: dict[str, int] = {}
    for net in {each.net for look in looks.values() for each in look.interfaces if each.physical and each.mbps}:
        mine = [_in(look.interfaces, net) for look in looks.values()]
        if all(mine):
            slowest[net] = min(each.mbps for each in mine if each is not None)
    best = max(slowest, key=lambda net: (slowest[net], net), default=None)
    floor = min((each.mbps if each else 0 for each in of_ray.values()), default=0)
    result = {}
    for host, look in looks.items():
        faster = _in(look.interfaces, best) if best is not None and slowest[best] > floor else None
        found = faster or of_ray[host]
        if found is not None:
            result[host] = found
    return result


def network_env(look: HostLook, interface: Interface | None, *, unified: bool, gpus: bool) -> dict[str, str]:
    """The environment of an actor on that host. What Ray was started with there stands.

    Args:
        interface: that its hosts reach each other by; None: nothing is known, or there is one host alone.
        unified: whether its GPU has the host's memory (GB10).
        gpus: whether it has one.
    """
    env: dict[str, str] = {}
    if interface is not None:
        env["GLOO_SOCKET_IFNAME"] = interface.name
        if gpus:
            env["NCCL_SOCKET_IFNAME"] = f"={interface.name}"  # this one, and none that begins like it
            fast = sorted(name for name, mbps in look.rdma.items() if interface.mbps and mbps >= interface.mbps)
            if fast:  # a port of a GB10 is two devices of half its rate: NCCL uses both
                env["NCCL_IB_HCA"] = "=" + ",".join(fast)
    if unified:
        env |= _GB10
    if unified and look.ptxas is not None:
        env["TRITON_PTXAS_PATH"] = look.ptxas  # the one inside Triton's wheel may not know sm_121
    return {key: value for key, value in env.items() if key not in look.given}


def is_physical(interface: Path) -> bool:
    """Whether there is a device behind it, or a bond of several: no bridge, tunnel or container's.

    Args:
        interface: its folder in ``/sys/class/net``.
    """
    return (interface / "device").exists() or (interface / "bonding").exists()


def _in(interfaces: Sequence[Interface], net: str) -> Interface | None:
    """The fastest device of a host in a net."""
    inside = [each for each in interfaces if each.net == net and each.physical and each.mbps]
    return max(inside, key=lambda each: (each.mbps, each.name), default=None)


def _mbps(interface: Path) -> int:
    """Of a link that is up; 0: it is down, or does not say (the kernel answers -1, or with an error)."""
    try:
        if (interface / "operstate").read_text(encoding="ascii").strip() == "down":
            return 0
        return max(int((interface / "speed").read_text(encoding="ascii")), 0)
    except (OSError, ValueError):
        return 0


def _address(name: str) -> str | None:
    """Its IPv4 address with the length of the prefix; None: it has none."""
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            address = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            mask = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFNETMASK, request)[20:24])
        except OSError:
            return None
    return ipaddress.ip_interface(f"{address}/{mask}").with_prefixlen
