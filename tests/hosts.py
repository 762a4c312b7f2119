"""Several hosts on one machine: Linux namespaces with their own network, processes, shared memory, name and Ray.

Each host has two interfaces, on two switches: ``fast0`` (10.73.0.x), which Ray is told to use, and ``mgmt0``
(10.74.0.x), which a program takes that does not ask. Its own name leads to 127.0.1.1, as Debian writes it into
/etc/hosts. The file system is shared, but for /dev/shm and /tmp/ray.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_NETS = {"fast0": "10.73.0", "mgmt0": "10.74.0"}
_START_S = 60
_FINDS_A_DEAD_NODE = {  # in seconds instead of most of a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def why_not() -> str | None:
    """What this machine lacks to have hosts in it; None: nothing."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} on the path"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One host. init: process id of its first process, with which all others in it end."""

    name: str
    number: int
    switch: str
    token: Path
    init: int
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{_NETS['fast0']}.{self.number}"

    def popen(self, *command: str, log: Path, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """Starts a process on this host; what it says goes to ``log``."""
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "GLOO_", "NCCL_"))}
        inside = ["env", f"--chdir={cwd}", *command] if cwd is not None else command  # nsenter goes to the root
        known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "COLUMNS": "200"}
        with log.open("w") as out:
            process = subprocess.Popen(
                ["nsenter", f"--target={self.init}", "--net", "--pid", "--mount", "--uts", "--ipc", *inside],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                env=outside | known | _FINDS_A_DEAD_NODE | variables,
            )
        self._processes.append(process)
        return process

    def start_ray(self, head: Host, logs: Path, *options: str) -> None:
        """A Ray node of two CPUs, head of a new cluster if it is ``head`` itself; returns when it has joined."""
        begins = ["--head", "--port=6379", "--include-dashboard=false"]
        where = begins if head is self else [f"--address={head.address}:6379"]
        sizes = ["--num-cpus=2", f"--object-store-memory={128 << 20}"]
        process = self.popen(
            *_program("ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *where, *sizes),
            f"--node-ip-address={self.address}",
            *options,
            log=logs / f"ray-{self.name}.log",
        )
        wait_until(lambda: self._joined(head, logs) or process.poll() is not None, "Ray starts on " + self.name)
        assert process.poll() is None, (logs / f"ray-{self.name}.log").read_text()

    def _joined(self, head: Host, logs: Path) -> bool:
        text = (logs / f"ray-{self.name}.log").read_text()
        return "Ray runtime started." in text

    def cut(self) -> None:
        """Unplugs the fast network."""
        _ip("netns", "exec", self.switch, "ip", "link", "set", f"fast0-{self.number}", "down")

    def received(self, interface: str) -> int:
        """Bytes that came to this host by an interface since it began."""
        command = ["nsenter", f"--target={self.init}", "--net", "cat", "/proc/net/dev"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return next(int(line.split()[1]) for line in text.splitlines() if line.strip().startswith(f"{interface}:"))

    def kill(self) -> None:
        """The host is gone: its first process is killed, and the kernel ends all others."""
        if Path(f"/proc/{self.init}").exists():
            os.kill(self.init, 9)
        for process in self._processes:
            process.wait(timeout=30)


def _program(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def wait_until(condition: Any, what: str, seconds: float = _START_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Sequence[Host]]:
    """``count`` connected hosts; on leaving, they and all that ran on them are gone.

    Args:
        folder: for the token that their Ray nodes share, and files that they are given.
    """
    mark = f"rl{os.getpid()}"
    switch = f"{mark}s"
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(os.urandom(32).hex())
    Path("/tmp/ray").mkdir(exist_ok=True)  # each host mounts its own there
    with ExitStack() as stack:
        _namespace(switch, stack)
        for net in _NETS:
            _ip("-n", switch, "link", "add", net, "type", "bridge")
            _ip("-n", switch, "link", "set", net, "up")
        yield [_host(number, f"{mark}h{number}", switch, token, folder, stack) for number in range(1, count + 1)]


def _namespace(name: str, stack: ExitStack) -> None:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)


def _host(number: int, namespace: str, switch: str, token: Path, folder: Path, stack: ExitStack) -> Host:
    _namespace(namespace, stack)
    for net, prefix in _NETS.items():
        port = f"{net}-{number}"
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", net, "netns", namespace)
        _ip("-n", switch, "link", "set", port, "master", net, "up")
        _ip("-n", namespace, "addr", "add", f"{prefix}.{number}/24", "dev", net)
        _ip("-n", namespace, "link", "set", net, "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    name = f"host{number}"
    names = folder / f"hosts-{number}"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    ready = folder / f"ready-{number}"
    script = (
        f"mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /tmp/ray && mount --bind {names} /etc/hosts && "
        f"hostname {name} && touch {ready} && while :; do sleep 3600 & wait $!; done"
    )
    own = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc"]
    starter = subprocess.Popen(["ip", "netns", "exec", namespace, *own, "bash", "-c", script], stdin=subprocess.DEVNULL)
    stack.callback(starter.wait, 30)
    stack.callback(starter.kill)
    wait_until(lambda: ready.exists() or starter.poll() is not None, f"{name} is there")
    assert starter.poll() is None, f"{name} could not be made"
    (init,) = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
    host = Host(name, number, switch, token, int(init))
    stack.callback(host.kill)
    return host
