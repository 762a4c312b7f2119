"""Rewards in worker processes, each call with a time limit.

A reward function is somebody's code: it loops for ever, holds the interpreter in C code, ends its process. None of
that may cost more than the sample that it happened on. So the pool follows every single call: a worker reports each as
it ends, and one that does not report within the limit is killed and replaced; what it had not begun goes to another.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import RewardConfig
from rlsys.rewards.base import Failure, FailureKind, RewardResult
from rlsys.rewards.budget import FailureBudget, failure_row
from rlsys.rewards.channel import Channel
from rlsys.rewards.compose import Part, ScoredSample, build_parts, combine
from rlsys.rewards.worker import WORKER_FILE, CallDone, PartSpec

Item = tuple[str, dict[str, Any]]

START_TIMEOUT_S = 120.0  # imports included, on a busy machine
_TRACE_TIMEOUT_S = 1.0
_LARGEST_CHUNK = 64  # samples in one message
_TRACE_CHARACTERS = 1500


class RewardPool:
    """Scores samples in worker processes.

    Args:
        parts: from :func:`rlsys.rewards.compose.build_parts`.
        workers: number of processes.
        timeout_s: limit of one call of one part, in seconds of wall time.

    Raises:
        UserError: a worker process cannot import or prepare a part.
    """

    def __init__(self, parts: Sequence[Part], *, workers: int = 1, timeout_s: float = 5.0):
        self._parts = list(parts)
        self._size = workers
        self._timeout_s = timeout_s
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._fill()
            while not all(process.ready for process in self._processes):
                self._step(None)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, config: RewardConfig) -> RewardPool:
        """The pool that ``reward`` describes. Raises UserError for a part that does not hold."""
        return cls(build_parts(config.parts), workers=config.workers, timeout_s=config.timeout_s)

    def score(
        self, items: Sequence[Item], *, budget: FailureBudget | None = None, total: int | None = None
    ) -> list[ScoredSample]:
        """Scores (response, task) pairs, in their order.

        Args:
            budget: held against after every failure, so that a reward that hangs on each sample ends the step early.
            total: samples in the step that the budget is a fraction of; None: these.

        Raises:
            RewardBudgetExceeded: by ``budget``.
            UserError: a worker process that had to be replaced does not start again.
        """
        with self._lock:
            if self._closed:
                raise ValueError("the reward pool is closed")
            job = _Job(self._parts, items, budget, total)
            try:
                while job.unfinished:
                    self._fill()
                    self._dispatch(job)
                    self._step(job)
            except BaseException:
                for process in [p for p in self._processes if p.pending]:
                    self._drop(process)  # its next results would be of a job that nobody waits for
                raise
            self._fill()
            return job.scored

    def close(self) -> None:
        """Ends the worker processes. Idempotent."""
        self._closed = True
        for process in list(self._processes):
            self._drop(process)
        self._selector.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _fill(self) -> None:
        specs = [PartSpec(p.name, p.path, p.args, p.when.text if p.when else None) for p in self._parts]
        while len(self._processes) < self._size:
            process = _Process(specs)
            self._processes.append(process)
            self._selector.register(process.channel.sock, selectors.EVENT_READ, process)

    def _dispatch(self, job: _Job) -> None:
        """Gives idle workers a chunk each; chunks shrink towards the end so that all finish together."""
        for process in [p for p in self._processes if p.ready and not p.pending]:
            size = max(1, min(_LARGEST_CHUNK, len(job.queue) // (2 * self._size)))
            chunk = [job.queue.popleft() for _ in range(min(size, len(job.queue)))]
            if not chunk:
                return
            try:
                process.channel.send([job.items[index] for index in chunk])
            except OSError:  # it died while it was idle: no sample's fault
                job.queue.extendleft(reversed(chunk))
                self._drop(process)
                continue
            process.pending.extend(chunk)
            process.position = 0
            process.deadline = time.monotonic() + self._timeout_s

    def _step(self, job: _Job | None) -> None:
        """Waits for the next reports or the next deadline, and deals with them."""
        if not self._processes:
            return  # all died while they were idle; new ones come next
        deadline = min(p.deadline for p in self._processes if p.deadline is not None)  # somebody has something to do
        for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
            self._read(key.data, job)
        for process in list(self._processes):
            late = process.deadline is not None and time.monotonic() > process.deadline
            if late and not process.has_reported():  # this process may have been held up, not the worker
                self._lose(process, job, "timeout")

    def _read(self, process: _Process, job: _Job | None) -> None:
        try:
            messages = process.channel.receive()
        except EOFError:
            self._lose(process, job, "crashed")
            return
        for message in messages:
            if isinstance(message, UserError):
                raise message
            if job is None or not process.ready:
                process.ready, process.deadline = True, None
                continue
            self._record(process, job, message)

    def _record(self, process: _Process, job: _Job, done: CallDone) -> None:
        finished = done.following is None
        index = process.pending.popleft() if finished else process.pending[0]
        process.position = done.following or 0
        process.deadline = time.monotonic() + self._timeout_s if process.pending else None
        job.record(index, self._parts[done.position].name, done.outcome, finished=finished)

    def _lose(self, process: _Process, job: _Job | None, kind: FailureKind) -> None:
        """A worker is late or dead: the call in progress has failed; what it had not begun is queued again."""
        trace = self._drop(process, kind)
        if not process.ready:
            what = f"did not start within {START_TIMEOUT_S:.0f} s" if kind == "timeout" else process.ending()
            raise UserError(f"a reward worker {what}\n{trace}".strip(), where="reward.parts")
        if job is None or not process.pending:
            return
        index, *rest = process.pending
        job.queue.extendleft(reversed(rest))
        what = f"no result within {self._timeout_s:g} s" if kind == "timeout" else f"the worker {process.ending()}"
        name = self._parts[process.position].name
        job.record(index, name, Failure(kind, name, f"{what}\n{trace}".strip()), finished=True)

    def _drop(self, process: _Process, kind: FailureKind | None = None) -> str:
        self._selector.unregister(process.channel.sock)
        self._processes.remove(process)
        return process.kill(kind)


class _Job:
    """One call of :meth:`RewardPool.score`. ``queue``: positions in ``items`` that no worker has."""

    def __init__(self, parts: Sequence[Part], items: Sequence[Item], budget: FailureBudget | None, total: int | None):
        self.items = items
        self.queue = deque(range(len(items)))
        self.unfinished = len(items)
        self._parts = parts
        self._outcomes: list[dict[str, RewardResult | Failure]] = [{} for _ in items]
        self._scored: dict[int, ScoredSample] = {}
        self._failed: list[dict[str, Any]] = []
        self._budget, self._total = budget, len(items) if total is None else total

    @property
    def scored(self) -> list[ScoredSample]:
        return [self._scored[index] for index in range(len(self.items))]

    def record(self, index: int, part: str, outcome: RewardResult | Failure, *, finished: bool) -> None:
        self._outcomes[index][part] = outcome
        if not finished:
            return
        sample = self._scored[index] = combine(self._parts, self._outcomes[index])
        self.unfinished -= 1
        if sample.failure is not None:
            self._failed.append(failure_row(index, *self.items[index], sample))
            if self._budget is not None:
                self._budget.check(self._failed, self._total)


class _Process:
    """A worker process as the pool sees it.

    ready: it has imported and prepared the parts.
    pending: the samples that it has, the one in progress first; ``position``: the part whose call is in progress.
    deadline: ``time.monotonic()`` by which it has to report; None: it has nothing to do.
    """

    def __init__(self, specs: Sequence[PartSpec]):
        ours, theirs = socket.socketpair()
        self._lifeline, lifeline = socket.socketpair()
        self._trace_fd, trace_fd = os.pipe()
        fds = (theirs.fileno(), lifeline.fileno(), trace_fd)
        code = f"import sys; sys.path[:] = {sys.path!r}; from rlsys.rewards.worker import main; main{fds}"
        # A plain interpreter instead of multiprocessing's: it re-imports no __main__ (a user's; Ray's, with all of Ray)
        # and starts from any thread of any actor. In a session of its own it is not hit by a terminal's Ctrl-C, and
        # what the reward itself started ends with it.
        self._popen = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints must not disturb the display
            start_new_session=True,
        )
        theirs.close()
        lifeline.close()
        os.close(trace_fd)
        ours.settimeout(START_TIMEOUT_S)  # bounds a send to a worker that does not read
        self.channel = Channel(ours)
        self.ready = False
        self.pending: deque[int] = deque()
        self.position = 0
        self.deadline: float | None = time.monotonic() + START_TIMEOUT_S
        with contextlib.suppress(OSError):  # dead already: the end of its channel says so
            self.channel.send(list(specs))

    def has_reported(self) -> bool:
        """Whether something of it waits to be read."""
        return _readable(self.channel.sock.fileno(), 0.0)

    def kill(self, kind: FailureKind | None) -> str:
        """Ends it and everything that it started.

        Args:
            kind: why; None: it did nothing wrong. One that hangs is first asked (SIGABRT) to say where it is.

        Returns:
            its last words: the traceback of a fatal signal.
        """
        if kind == "timeout":
            os.kill(self._popen.pid, signal.SIGABRT)
        trace = self._last_words() if kind else ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(timeout=START_TIMEOUT_S)
        self.channel.sock.close()
        self._lifeline.close()
        os.close(self._trace_fd)
        return trace

    def _last_words(self) -> str:
        deadline, data = time.monotonic() + _TRACE_TIMEOUT_S, b""
        while _readable(self._trace_fd, max(0.0, deadline - time.monotonic())):
            block = os.read(self._trace_fd, 1 << 16)
            if not block:
                break
            data += block
        text = data.decode(errors="replace")
        stack = text.split("\n\n")[1] if "\n\n" in text else ""  # without the headline, which may name our own SIGABRT
        return stack.partition(f'\n  File "{WORKER_FILE}"')[0][:_TRACE_CHARACTERS].rstrip()

    def ending(self) -> str:
        """How it ended, in words."""
        code = self._popen.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended itself with exit code {code}"


def _readable(fd: int, wait_s: float) -> bool:
    poll = select.poll()  # select() itself refuses file descriptors above 1023, which a Ray actor may have
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))
