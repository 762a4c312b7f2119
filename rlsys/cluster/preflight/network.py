"""Probes of ports, names, interfaces, clocks and of a Ray cluster that runs already."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from rlsys.cluster.preflight.machine import Interface, Machine
from rlsys.cluster.preflight.report import Finding, Issue
from rlsys.cluster.session import probe

_FAST_SHARE = 0.5  # an interface with less than this share of the fastest one's rate is the wrong one
_EARLIEST = datetime(2026, 1, 1, tzinfo=UTC).timestamp()  # before this version was written
_LATEST = datetime(2100, 1, 1, tzinfo=UTC).timestamp()
_SKEW_S = (1.0, 60.0)  # said; an error: certificates and lock files go wrong


def ports(wanted: Mapping[int, str] | None = None, *, own_address: str | None) -> Finding:
    """Whether this host can listen: on its loopback, on the address that its name leads to, on ports by number.

    Args:
        wanted: what each port is for. own_address: what the host's name resolves to; None: to nothing.
    """
    issues = []
    for port, purpose in (wanted or {}).items():
        if error := _cannot_listen("", port):
            what, fix = (
                f"port {port} ({purpose}) cannot be listened on: {error}",
                "end who has it (ss -ltnp), or choose another",
            )
            issues.append(Issue("port_taken", "error", what, f"port {port}", fix))
    if error := _cannot_listen("127.0.0.1", 0):
        what, fix = f"no port can be opened on the loopback interface: {error}", "bring it up: ip link set lo up"
        issues.append(Issue("loopback_down", "error", what, "lo", fix))
    name = socket.gethostname()
    fix = f"write this host's address and '{name}' into /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    if own_address is None:
        what = f"the host's name '{name}' leads to no address"
        issues.append(Issue("host_name_unknown", "warning", what, "/etc/hosts", fix))
    elif error := _cannot_listen(own_address, 0):
        what = f"the host's name '{name}' leads to {own_address}, which is no address of this host ({error})"
        issues.append(Issue("host_name_foreign", "warning", what, "/etc/hosts", fix))
    return Finding({"host": name, "address": own_address, "ports": sorted(wanted or {})}, tuple(issues))


def interface(machine: Machine, *, several_hosts: bool, gbit: float = 0.0, pinned: bool = False) -> Finding:
    """Whether NCCL and gloo are told an interface that is there, and the fast one.

    Args:
        several_hosts: ranks on several hosts meet.
        gbit: rate of the link that the topology says is between them; 0: not known.
        pinned: without being told NCCL takes the slow one there.
    """
    up = {n: i for n, i in machine.interfaces.items() if i.up and i.addresses and not _loopback(i)}
    devices = [name for name in up if up[name].physical] or up  # a container's bridge says 10 Gb/s, and leads nowhere
    fastest = max(devices, key=lambda name: up[name].gbit, default=None)
    named = {v: machine.variables[v] for v in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if machine.variables.get(v)}
    issues = []
    for variable, value in named.items():
        names = chosen(value, machine.interfaces) if variable.startswith("NCCL") else value.split(",")
        names = [name for name in names if name in machine.interfaces]  # gloo wants whole names
        for name in names:
            issues += _interface_issues(variable, name, machine.interfaces.get(name), up, fastest, several_hosts, gbit)
        if not names:
            what = f"{variable}={value} matches none of this host's interfaces: {', '.join(machine.interfaces)}"
            fix = f"export {variable}={fastest or 'NAME'}"
            issues.append(Issue("interface_missing", "error", what, variable, fix))
    if several_hosts and pinned and "NCCL_SOCKET_IFNAME" not in named:
        what = "NCCL is told no interface, and would take whichever comes first, which may be the slow one"
        fix = f"export NCCL_SOCKET_IFNAME={fastest or 'NAME'} on every host (see `ip -br addr` for the fast one)"
        issues.append(Issue("interface_unpinned", "error", what, "NCCL_SOCKET_IFNAME", fix))
    if several_hosts and not up:
        what, fix = "no interface but the loopback is up", "bring one up: ip link set NAME up"
        issues.append(Issue("network_down", "error", what, "network", fix))
    facts = {"interfaces": {name: {"gbit": i.gbit, "addresses": list(i.addresses)} for name, i in up.items()}, **named}
    return Finding(facts, tuple(issues))


def chosen(value: str, interfaces: Mapping[str, Interface]) -> list[str]:
    """Which interfaces a value of ``NCCL_SOCKET_IFNAME`` leaves: prefixes, ``=`` exact names, ``^`` all others."""
    invert, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    words = [word for word in value.lstrip("^=").split(",") if word]
    hit = {n for n in interfaces if any(n == w if exact else n.startswith(w) for w in words)}
    return [name for name in interfaces if (name in hit) != invert]


def _interface_issues(
    variable: str,
    name: str,
    seen: Interface | None,
    up: Mapping[str, Interface],
    fastest: str | None,
    several_hosts: bool,
    gbit: float,
) -> list[Issue]:
    """Of an interface that a variable chose."""
    fix = f"export {variable}={fastest or 'NAME'}"
    if seen is None or not seen.up:
        return [
            Issue(
                "interface_down",
                "error",
                f"{variable} chooses {name}, which is down",
                variable,
                f"ip link set {name} up, or {fix}",
            )
        ]
    if not several_hosts:
        return []
    if _loopback(seen):
        return [
            Issue(
                "interface_loopback",
                "error",
                f"{variable} chooses {name}, by which no other host is reached",
                variable,
                fix,
            )
        ]
    best = max(gbit, up[fastest].gbit if fastest else 0.0)
    if seen.gbit and seen.gbit < _FAST_SHARE * best:
        what = f"{variable} chooses {name} with {seen.gbit:g} Gb/s, and the link between the hosts has {best:g} Gb/s"
        # Where RDMA carries the data, this one only introduces; on a link that the topology knows, it is all there is.
        return [Issue("interface_slow", "error" if gbit else "warning", what, variable, fix)]
    return []


def clock(now: float, *, file_time: float | None = None) -> Finding:
    """Whether the date can be true, and the disk's clock is this host's.

    Args:
        now: Unix seconds. file_time: of a file that was written just now.
    """
    facts = {"now": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")}
    fix = "set the clock: timedatectl set-ntp true"
    if not _EARLIEST <= now < _LATEST:
        return Finding(facts, (Issue("clock_wrong", "error", f"this host's date is {facts['now']}", "clock", fix),))
    if file_time is not None and abs(file_time - now) > _SKEW_S[0] * 5:
        what = f"the file system's clock is {file_time - now:+.0f} s from this host's"
        return Finding(facts, (Issue("clock_of_disk", "warning", what, "clock", f"{fix}, on the file server too"),))
    return Finding(facts)


def skew(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Whether the nodes' clocks agree.

    Args:
        offsets: by node, by how many seconds it is ahead, and how many of them may be what asking took.
    """
    issues = []
    for node, (ahead, doubt) in offsets.items():
        sure = abs(ahead) - doubt
        if sure > _SKEW_S[0]:
            what = f"the node's clock is {ahead:+.1f} s from that where the run starts"
            fix = "run a time service on every node: timedatectl set-ntp true (or chrony)"
            issues.append(Issue("clock_skew", "error" if sure > _SKEW_S[1] else "warning", what, "clock", fix, node))
    return Finding({"ahead_s": {node: round(ahead, 3) for node, (ahead, _) in offsets.items()}}, tuple(issues))


def ray_cluster(address: str | None, *, token: Path | None = None, mode: str | None = None) -> Finding:
    """Whether a cluster that should be running answers, and this user has its token.

    Args:
        address: of the configuration; None: the run starts a cluster of its own.
        token: the file with it; None: as Ray finds it. mode: ``RAY_AUTH_MODE``; None: of the environment.
    """
    mode = (mode if mode is not None else os.environ.get("RAY_AUTH_MODE", "")).lower()
    token = token or token_file()
    facts: dict[str, object] = {
        "address": address or "the run's own",
        "auth": mode or "default",
        "token": token.is_file(),
    }
    issues = []
    if mode == "disabled":
        what = "Ray's authentication is off: whoever reaches its ports can run code"
        issues.append(Issue("ray_open", "warning", what, "RAY_AUTH_MODE", "unset RAY_AUTH_MODE"))
    elif token.is_file():
        if token.stat().st_mode & 0o077:
            what, fix = f"others can read Ray's token: {token}", f"chmod 600 {token}"
            issues.append(Issue("ray_token_readable", "info", what, str(token), fix))
        if not os.environ.get("RAY_AUTH_TOKEN") and not token.read_text(encoding="utf-8").strip():
            fix = f"copy it from the cluster's head node, or remove {token} and run `ray get-auth-token --generate`"
            issues.append(Issue("ray_token_empty", "error", "Ray's token is empty", str(token), fix))
    elif address is not None and not os.environ.get("RAY_AUTH_TOKEN"):
        what, fix = "there is no token for the Ray cluster", f"copy it from the cluster's head node to {token}"
        severity = "error" if mode == "token" or os.environ.get("RAY_AUTH_TOKEN_PATH") else "warning"
        issues.append(Issue("ray_token_missing", severity, what, str(token), fix))  # type: ignore[arg-type]
    if address is not None:
        issues += _unreachable(address)
    return Finding(facts, tuple(issues))


def token_file() -> Path:
    """Where Ray looks for its token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()


def _unreachable(address: str) -> list[Issue]:
    """An issue where nobody listens at ``host:port``; other forms (``auto``, ``ray://…``) are Ray's to look up."""
    try:
        probe(address)
    except OSError as error:
        what = f"no Ray cluster answers at '{address}': {error}"
        fix = "start one with `ray start --head`, or choose cluster=local for one of the run's own"
        return [Issue("ray_unreachable", "error", what, "cluster.address", fix)]
    return []


def _cannot_listen(address: str, port: int) -> str | None:
    """Why not, in words."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def _loopback(seen: Interface) -> bool:
    return bool(seen.addresses) and all(a.startswith("127.") or a == "::1" for a in seen.addresses)


def clock_here(folder: Path) -> Finding:
    """This host's date, and that of the disk which ``folder`` is on, where a file can be written there."""
    written = None
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")
        file.flush()
        written = os.fstat(file.fileno()).st_mtime
    return clock(time.time(), file_time=written)
