"""Where the threads of a process are: its own, and those of others of this host, which need not answer for it.

py-spy comes with Ray and reads another process's memory, also of one that is stopped. Where it is missing or may not
(``kernel.yama.ptrace_scope``), workers that called :func:`answer_signal` write their stacks on a signal, into memory
that this process reads from ``/proc``: nothing lies about when a worker is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil

SIGNAL = signal.SIGUSR2
_NAME = "rlsys-stacks"
_DUMP_S = 20.0  # py-spy reads a process with vLLM in it in two seconds
_ANSWER_S = 3.0
_POLL_S = 0.05
_file: int | None = None


def answer_signal() -> None:
    """From now on this process writes the stacks of all its threads on ``SIGUSR2``; calling it again does nothing."""
    global _file
    if _file is None and hasattr(os, "memfd_create"):
        _file = os.memfd_create(_NAME)
        faulthandler.register(SIGNAL, file=_file, all_threads=True, chain=False)


def own() -> str:
    """Of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {number} ({names.get(number, '?')})\n" + "".join(traceback.format_stack(frame))
        for number, frame in sys._current_frames().items()
    )


def of(pid: int) -> str:
    """Of a process of this host, in words where they cannot be had."""
    if pid == os.getpid():
        return own()
    by_spy = _spied(pid)
    if by_spy.startswith("Process "):
        return by_spy
    answered = _answered(pid)
    return answered if answered is not None else f"no stacks: {by_spy}; and it does not answer {SIGNAL.name}"


def of_tree(pid: int) -> str:
    """Of a process of this host and of the Python processes below it (vLLM's engine, reward functions), youngest last.

    Returns:
        One section a process, headed by its number, state (``stopped``, ``sleeping``, …) and command line.
    """
    try:
        first = psutil.Process(pid)
        tree = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return f"process {pid} is gone\n"
    parts = []
    for process in tree:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            command = " ".join(process.cmdline())[:200] or process.name()
            head = f"=== process {process.pid}, {process.status()}: {command}"
            parts.append(f"{head}\n{of(process.pid) if process is first or _is_python(process) else ''}\n")
    return "\n".join(parts) or f"process {pid} is gone\n"


def spy() -> str | None:
    """Path of py-spy: beside this interpreter, else on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy")


def _spied(pid: int) -> str:
    program = spy()
    if program is None:
        return "py-spy is not installed"
    try:
        done = subprocess.run(
            [program, "dump", "--pid", str(pid), "--nonblocking"],
            capture_output=True,
            text=True,
            timeout=_DUMP_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    return done.stdout if done.returncode == 0 else f"py-spy: {done.stderr.strip() or done.returncode}"


def _answered(pid: int) -> str | None:
    """What the process writes on the signal; None: it did not ask for it, or does not run."""
    found = _memory_of(pid)
    if found is None:
        return None
    before = found.stat().st_size
    deadline, seen = time.monotonic() + _ANSWER_S, before
    with contextlib.suppress(OSError):
        os.kill(pid, SIGNAL)
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            size = found.stat().st_size
            if size == seen > before:  # it has written, and writes no more
                return found.read_bytes()[before:].decode(errors="replace")
            seen = size
    return None


def _memory_of(pid: int) -> Path | None:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(descriptor).startswith(f"/memfd:{_NAME}"):
                    return descriptor
    return None


def _is_python(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "python" in Path(process.exe()).name
    return False
