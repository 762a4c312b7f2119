"""Memory of all processes of a run together, shared pages counted once: the sum of proportional set sizes (PSS)."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import psutil


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process: its own pages, and its share of those that it has in common with others.
    Where the kernel does not tell (not Linux, or another user's process): the resident set. 0: it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no such file or no permission: the resident set below
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


class MemoryMonitor:
    """Samples the memory of this process and all its descendants in a thread, and keeps the peak.

    A process that was once seen stays watched when its parent dies and it is handed to init, as daemons are. One that
    was handed over before the first sample has to be named by :meth:`watch` (as a Ray node that ``ray start`` made).

    Args:
        interval_s: between samples; one costs a few milliseconds of CPU time a process.
    """

    def __init__(self, interval_s: float = 2.0):
        self._interval_s = interval_s
        self._known: dict[int, psutil.Process] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.last_bytes = 0
        self.peak_bytes = 0
        self.peak_by_name: dict[str, int] = {}
        """Bytes by process name at the peak."""
        self.watch(psutil.Process().pid)

    def watch(self, pid: int) -> None:
        """Counts the process ``pid`` and its descendants too."""
        with self._lock:
            self._known[pid] = psutil.Process(pid)

    def start(self) -> MemoryMonitor:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="memory-monitor", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> int:
        """Takes a last sample and ends the thread. Returns the peak in bytes."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self.sample()
        return self.peak_bytes

    def __enter__(self) -> MemoryMonitor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def sample(self) -> int:
        """Measures now. Returns the sum in bytes."""
        with self._lock:
            by_name: Counter[str] = Counter()
            for process in self._living():
                try:
                    name = _short_name(process.name())
                except psutil.NoSuchProcess:
                    continue
                by_name[name] += pss_bytes(process.pid)
            self.last_bytes = by_name.total()
            if self.last_bytes > self.peak_bytes:
                self.peak_bytes = self.last_bytes
                self.peak_by_name = dict(by_name.most_common())
            return self.last_bytes

    def _living(self) -> list[psutil.Process]:
        """Known processes and all that descend from them, in one pass over the process table."""
        children: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter(["ppid"]):
            children.setdefault(process.info["ppid"], []).append(process)
        known = {pid: process for pid, process in self._known.items() if process.is_running()}
        pending = list(known)
        while pending:
            for child in children.get(pending.pop(), []):
                if child.pid not in known:
                    known[child.pid] = child
                    pending.append(child.pid)
        self._known = known
        return list(known.values())

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval_s)


def _short_name(name: str) -> str:
    """``ray::RewardWorker.score()`` and ``ray::RewardWorker.start()`` are one kind of process."""
    return name.partition("(")[0].partition(".")[0] if name.startswith("ray::") else name
