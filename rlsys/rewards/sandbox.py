"""Untrusted Python programs, run where they can do no harm.

A program runs under bubblewrap in namespaces of its own: no network, no other processes, no file but the interpreter's
(which it cannot write) and a small scratch folder in memory, no environment, no system call that ``seccomp`` refuses.
Limits of the kernel bound its CPU time, address space, file sizes and open files; what it has no limit for (all its
processes together: how many, how much memory, how long) is looked at every few milliseconds, and the whole namespace is
killed as one. What is looked at is resident memory: pages that a program shares and gives back are bounded by its
address space alone.

Where bubblewrap does not work nothing runs, unless the caller accepts limits alone: then a program may read, change and
delete what its user may, and talk to the network.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rlsys.config.errors import UserError
from rlsys.rewards import seccomp

Isolation = Literal["namespaces", "limits"]
Ending = Literal["exited", "timeout", "memory", "processes", "output", "signal"]

_BOX = "/box"  # a program's folder, inside
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")  # links or folders, by distribution
_NOBODY = "65534"
_POLL_S = 0.005
_END_S = 5.0  # for a namespace that was killed to be gone
_THREADS = 16  # of a process, on average
_OWN = 4  # bubblewrap and the first process of its namespace, both twice for ``as_nobody``
_PAGE = os.sysconf("SC_PAGE_SIZE")

# Runs inside, before the program: hard limits cannot be raised again without privileges, which nobody there has.
_BOOT = """
import resource, sys
{first}
for name, value in {limits!r}:
    resource.setrlimit(getattr(resource, name), (value, value))
del resource, name, value
sys.argv = ["program.py"]
import runpy
runpy.run_path({path!r}, run_name="__main__")
"""

_ENDS_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9); del ctypes"  # as bubblewrap's --die-with-parent does


@dataclass(frozen=True)
class Limits:
    """What a program may use, all its processes together unless it says otherwise.

    seconds: of wall time. cpu_seconds: of CPU time, of one process. memory_mib: resident; also the address space of one
    process, with what an interpreter maps besides. processes: at once, with 16 threads each. scratch_mib: of its
    folder. file_mib: of one file. output_kib: of what it prints, both streams.
    """

    seconds: float = 5.0
    cpu_seconds: int = 10
    memory_mib: int = 512
    processes: int = 16
    scratch_mib: int = 32
    file_mib: int = 16
    output_kib: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended. returncode: of the interpreter, None where it was killed; stdout, stderr: as far as it may
    print; seconds: of wall time."""

    ending: Ending
    returncode: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.ending == "exited" and self.returncode == 0


def run_program(
    source: str, *, stdin: str = "", limits: Limits | None = None, isolation: Isolation = "namespaces"
) -> Outcome:
    """Runs a program to its end or to a limit. Nothing that it started outlives the call, but for what detached itself
    from it where there are no namespaces.

    Args:
        source: Python; the standard library of this interpreter is there.
        isolation: ``limits``: without namespaces, see the module.

    Raises:
        UserError: namespaces are asked for and do not work here.
    """
    limits = limits or Limits()
    if isolation == "namespaces":
        check_namespaces()
        return _in_namespaces(source, stdin, limits)
    with tempfile.TemporaryDirectory(prefix="rlsys-box-") as folder:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8")
        command = [*_python(), _boot(str(program), limits, first=_ENDS_WITH_PARENT)]
        return _watched(command, stdin, limits, env=_environment(folder), cwd=folder)


def _in_namespaces(source: str, stdin: str, limits: Limits) -> Outcome:
    own = {"PATH": os.environ.get("PATH", os.defpath)}
    # In no folder, which might be out of reach for the user that it will run as.
    with _in_memory(source.encode()) as program, _in_memory(seccomp.program()) as refused:
        command = [*as_nobody(), *namespaced(program, refused, limits)]
        return _watched(command, stdin, limits, env=own, fds=(program, refused))


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """An open file."""
    fd = os.memfd_create("rlsys")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@lru_cache(maxsize=1)
def check_namespaces() -> None:
    """Tries them once.

    Raises:
        UserError: bubblewrap is missing, or the system forbids what it needs.
    """
    fix = (
        "install bubblewrap (apt install bubblewrap) and allow user namespaces; in a container, run it with a seccomp "
        "profile that allows them. Or accept limits alone, without isolation, with isolation: limits"
    )
    if shutil.which("bwrap") is None:
        raise UserError("untrusted code is not run: bubblewrap (bwrap) is not installed", where="sandbox", fix=fix)
    outcome = _in_namespaces("print('here')", "", Limits(seconds=20.0))
    if outcome.stdout != "here\n":
        said = (outcome.stderr.strip().splitlines() or [f"it {outcome.ending}"])[-1]
        raise UserError(f"untrusted code is not run: bubblewrap does not work here: {said}", where="sandbox", fix=fix)


def as_nobody() -> list[str]:
    """What comes before bubblewrap's command line where this process is root: root in a namespace is still the owner
    of the host's device nodes and kernel settings. An interpreter in a folder that others may not enter (``/root``) is
    put where they may, for the program alone."""
    if os.geteuid() != 0:
        return []
    drop = ["setpriv", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups", "--"]
    prefix = Path(sys.base_prefix).resolve()
    closed = [folder for folder in (*reversed(prefix.parents), prefix) if not folder.stat().st_mode & stat.S_IXOTH]
    if not closed:
        return drop
    between = [folder for folder in reversed(prefix.parents) if closed[0] in folder.parents]
    cover = ["--perms", "0755", "--tmpfs", str(closed[0])]
    cover += [part for folder in between for part in ("--dir", str(folder))] + ["--ro-bind", str(prefix), str(prefix)]
    # In a PID namespace of their own: those that are nobody would not hear the death of a parent that is root, and only
    # the kernel ends them with it.
    around = ["bwrap", "--dev-bind", "/", "/", "--unshare-pid", *cover]
    return [*around, "--cap-add", "ALL", "--die-with-parent", "--", *drop]


def namespaced(program: int, refused: int, limits: Limits) -> list[str]:
    """The command line that runs what the open file ``program`` holds under bubblewrap; ``refused`` holds the filter of
    system calls."""
    mounts: list[str] = []
    for name in _SYSTEM:
        path = Path(name)
        if path.is_symlink():
            mounts += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            mounts += ["--ro-bind", name, name]
    prefix = Path(sys.base_prefix).resolve()
    if not any(prefix.is_relative_to(name) for name in _SYSTEM):
        mounts += ["--ro-bind", str(prefix), str(prefix)]
    size, scratch = str(limits.scratch_mib << 20), f"{_BOX}/scratch"
    return [
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000",
        "--cap-drop", "ALL", "--seccomp", str(refused), "--die-with-parent", "--new-session", "--hostname", "box",
        "--clearenv",
        *(part for name, value in _environment(scratch).items() for part in ("--setenv", name, value)),
        *mounts, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
        "--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm",
        "--dir", _BOX, "--size", size, "--tmpfs", scratch, "--symlink", scratch, "/tmp",
        "--ro-bind-data", str(program), f"{_BOX}/program.py",
        "--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", scratch,
        "--", *_python(), _boot(f"{_BOX}/program.py", limits),
    ]  # fmt: skip


def _python() -> list[str]:
    """Without a user's own folders, environment variables, or compiled files on disk; what follows is code."""
    return [os.path.realpath(sys.executable), "-I", "-B", "-c"]


def _environment(home: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", "TMPDIR": home, "OMP_NUM_THREADS": "1"}


def _boot(path: str, limits: Limits, *, first: str = "") -> str:
    memory = (limits.memory_mib << 20) + (256 << 20)  # of address space: libraries are mapped, and mostly not resident
    kernel = [
        ("RLIMIT_CPU", limits.cpu_seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", limits.file_mib << 20),
        ("RLIMIT_NOFILE", 128),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ]
    return _BOOT.format(limits=kernel, path=path, first=first)


def _watched(
    command: list[str],
    stdin: str,
    limits: Limits,
    *,
    env: dict[str, str],
    cwd: str | None = None,
    fds: tuple[int, ...] = (),
) -> Outcome:
    """Runs a command until it ends or meets a limit. fds: open files that it is given."""
    started = time.monotonic()
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=env, pass_fds=fds, start_new_session=True
    )
    try:
        ending, printed = _follow(process, stdin.encode(), limits, started)
    finally:
        _end(process)
    code = process.returncode
    if ending == "exited" and (code < 0 or code > 128):  # bubblewrap says 128 + n where its child met signal n
        ending = "signal"
    stdout, stderr = (part.decode(errors="replace") for part in printed)
    return Outcome(ending, code if ending == "exited" else None, stdout, stderr, time.monotonic() - started)


def _follow(
    process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, started: float
) -> tuple[Ending, tuple[bytes, bytes]]:
    """Feeds and reads the program until it ends or a limit is met."""
    printed: dict[int, bytearray] = {}
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    streams = (process.stdout, process.stderr)
    ending: Ending = "exited"
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            os.set_blocking(stream.fileno(), False)
            printed[stream.fileno()] = bytearray()
            selector.register(stream, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            over = process.poll() is not None  # before the last read: what it printed is in the pipe by now
            for key, _ in selector.select(0 if over else _POLL_S):
                if key.fileobj is process.stdin:
                    stdin = _feed(process.stdin.fileno(), stdin)
                    if not stdin:
                        selector.unregister(process.stdin)
                        _close(process.stdin)
                elif (part := _read(key.fd)) is not None:
                    printed[key.fd] += part
                    if not part:
                        selector.unregister(key.fileobj)
            if sum(map(len, printed.values())) > limits.output_kib << 10:
                ending = "output"
                break
            if over:
                break
            if time.monotonic() - started > limits.seconds:
                ending = "timeout"
                break
            if (broken := _over(process.pid, limits)) is not None:
                ending = broken
                break
    most = limits.output_kib << 10
    out, err = (bytes(printed[stream.fileno()][:most]) for stream in streams)
    return ending, (out, err)


def _feed(fd: int, data: bytes) -> bytes:
    """What is left to be written."""
    with contextlib.suppress(BlockingIOError):
        try:
            return data[os.write(fd, data[:65536]) :] if data else b""
        except BrokenPipeError:
            return b""
    return data


def _read(fd: int) -> bytes | None:
    """Empty at the end; None: nothing has come."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None


def _close(stream: object) -> None:
    with contextlib.suppress(BrokenPipeError, OSError):
        stream.close()  # type: ignore[attr-defined]


def _over(pid: int, limits: Limits) -> Ending | None:
    """Which limit all processes together are over."""
    memory = threads = 0
    most = limits.processes + _OWN
    for count, (each, its) in enumerate(_tree(pid), start=1):
        threads += its
        if count > most or threads > _THREADS * most:
            return "processes"
        with contextlib.suppress(OSError, ValueError, IndexError):
            memory += int(Path(f"/proc/{each}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    return "memory" if memory > limits.memory_mib << 20 else None


def _tree(pid: int) -> Iterator[tuple[int, int]]:
    """A process and all below it, each with how many threads it has. In a PID namespace orphans are adopted by its
    first process: none gets lost."""
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        tasks: list[str] = []
        with contextlib.suppress(OSError):
            tasks = os.listdir(f"/proc/{each}/task")
        yield each, len(tasks)
        for task in tasks:
            with contextlib.suppress(OSError), open(f"/proc/{each}/task/{task}/children", encoding="ascii") as file:
                waiting += [int(child) for child in file.read().split()]


def _depth(pid: int) -> int:
    """In how many PID namespaces, each in another, a process is."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return next((len(line.split()) - 1 for line in file if line.startswith("NSpid:")), 0)
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left. With its first process the kernel ends a namespace; bubblewrap, which waits for that, ends
    last, so that nothing outlives it, not even as a zombie that somebody else would have to bury."""
    left = [each for each, _ in _tree(process.pid)] if process.poll() is None else []
    outside = _depth(process.pid)
    inside = [each for each in left if _depth(each) > outside]
    for first in inside[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in () if inside else left[1:]:  # without namespaces, those that left its group
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            _close(stream)
