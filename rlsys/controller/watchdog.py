"""A thread of the driver that notices a wait in which nothing is answered any more, says who is waited for and writes
down where everybody is.

A wait that only takes long looks the same from here. So a stall ends nothing unless ``health.on_stall=stop``; it leaves
stacks, from which a person sees what is the matter.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import ray

from rlsys.cluster import processes
from rlsys.config.errors import UserError
from rlsys.config.modes import HealthConfig
from rlsys.tracking import stacks
from rlsys.workers.under_way import Wait, waits
from rlsys.workers.waits import StopFlag

_POLL_S = 1.0
_ROSTER_S = 15.0  # how often processes.json is compared with who runs, where nobody was replaced
_FAR_S = 60.0  # for the stacks of another host's actors
_NAMED = 8  # calls without an answer that the report names


class Alarm:
    """When a wait is worth reporting: after ``stall_s`` of silence, then each time that the silence has doubled."""

    def __init__(self, stall_s: float):
        self._stall_s = stall_s
        self._next: tuple[Wait, float, float] | None = None  # the wait, since when it is silent, silence to report at

    def check(self, silent: Sequence[Wait], now: float) -> Wait | None:
        """The wait to report now.

        Args:
            silent: waits under way, longest silence first; now: by the monotonic clock.
        """
        if not silent or now - silent[0].since < self._stall_s:
            return None
        wait = silent[0]
        known, since, due = self._next or (None, 0.0, 0.0)
        if known is not wait or since != wait.since:
            due = self._stall_s
        if now - wait.since < due:
            return None
        self._next = (wait, wait.since, 2 * max(due, self._stall_s))
        return wait


class Watchdog:
    """Looks every second, in a thread of its own, from :meth:`start` to :meth:`close`.

    Args:
        folder: of the run: ``stalls/`` and ``processes.json`` are written into it.
        say: told about a stall, for people (text) and for ``events.jsonl`` (text and fields).
        stop: asked to stop where a stall ends the run.
        handles: Ray's handles of the run's present actors, by ``ROLE_INDEX``.
        local: the run has a Ray cluster of its own.
        also: called every second too.
    """

    def __init__(
        self,
        folder: Path,
        health: HealthConfig,
        say: Callable[..., None],
        stop: StopFlag,
        handles: Callable[[], Mapping[str, Any]],
        *,
        local: bool,
        also: Callable[[], None] = lambda: None,
    ):
        self._folder, self._health, self._say, self._stop = folder, health, say, stop
        self._handles, self._local, self._also = handles, local, also
        self._alarm = Alarm(health.stall_s)
        self._known: dict[str, tuple[str, int]] = {}
        self._actors: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.stalled = ""
        """Why the run is to end; empty: it is not."""
        self.stalled_actors: list[str] = []

    def start(self) -> None:
        self.write_roster()
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_POLL_S + _FAR_S)

    def _run(self) -> None:
        roster = time.monotonic() + _ROSTER_S
        while not self._ended.wait(_POLL_S):
            self._also()
            now = time.monotonic()
            wait = self._alarm.check(waits(), now)
            if wait is not None:
                try:
                    self._report(wait, now)
                except (OSError, UserError, ray.exceptions.RayError):
                    # Nowhere to write, or the cluster is ending: said on the terminal; the clock is still looked at.
                    traceback.print_exc()
            if now >= roster or self._replaced():
                roster = now + _ROSTER_S
                self.look_who_runs()

    def look_who_runs(self) -> None:
        """:meth:`write_roster` where it can be done; where not, the next look does it."""
        # The cluster is ending, and so are we; or the disk is full.
        with suppress(ray.exceptions.RayError, RuntimeError, OSError, UserError):
            self.write_roster()

    def write_roster(self) -> None:
        """``processes.json``, where anybody is another process than the last time. Whoever replaces actors may call it;
        the thread does so from time to time."""
        with self._lock:
            handles = self._handles()
            self._actors = _ids(handles)
            running = processes.alive(processes.actor_table(handles))
            if running != self._known or not (self._folder / processes.NAME).exists():
                processes.write(self._folder, processes.of_run(running, local=self._local))
                self._known = running

    def _replaced(self) -> bool:
        """Whether there are other actors than the last time, or some that had no process then."""
        return _ids(self._handles()) != self._actors or len(self._known) < len(self._actors)

    def _report(self, wait: Wait, now: float) -> None:
        asked = wait.asked()
        who = "; ".join(f"{actor} ({what})" for actor, what in asked[:_NAMED])
        more = f" and {len(asked) - _NAMED} more" if len(asked) > _NAMED else ""
        text = (
            f"nothing has been answered for {now - wait.since:.0f} s in phase '{wait.phase}': waiting for {who}{more}"
        )
        where = self._folder / "stalls" / datetime.now().strftime("%Y%m%d-%H%M%S")
        written = self._write_stacks(where)
        ends = self._health.on_stall == "stop"
        text += f"; stacks of {written} actors are in {where}"
        self._say(
            text,
            phase=wait.phase,
            seconds=round(now - wait.since, 1),
            actors=[{"actor": actor, "what": what} for actor, what in asked],
            stacks=str(where),
            ends=ends,
        )
        if ends and not self.stalled:
            self.stalled, self.stalled_actors = text, [actor for actor, _ in asked]
            self._stop.request()

    def _write_stacks(self, where: Path) -> int:
        """Returns of how many actors."""
        where.mkdir(parents=True, exist_ok=True)
        (where / "driver.txt").write_text(f"=== process {os.getpid()}: the driver\n{stacks.own()}", encoding="utf-8")
        try:
            table = processes.actor_table(self._handles())
        except (ray.exceptions.RayError, RuntimeError) as error:
            (where / "cluster.txt").write_text(f"Ray's head says nothing: {error}\n", encoding="utf-8")
            return 0
        running = processes.alive(table)
        for name, entry in table.items():
            if name not in running:
                (where / f"{name}.txt").write_text(f"no process: {entry['State']}\n", encoding="utf-8")
        here = ray.get_runtime_context().get_node_id()
        far = {name: place for name, place in running.items() if place[0] != here}
        task = ray.remote(num_cpus=0, max_retries=0)(stacks.of_tree)
        asked = {
            name: task.options(scheduling_strategy=processes.on(node)).remote(pid) for name, (node, pid) in far.items()
        }
        for name, (_, pid) in running.items():
            if name not in far:
                (where / f"{name}.txt").write_text(stacks.of_tree(pid), encoding="utf-8")
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=_FAR_S)
        for name, ref in asked.items():
            (where / f"{name}.txt").write_text(_told(ref), encoding="utf-8")
        return len(running)


def _ids(handles: Mapping[str, Any]) -> set[str]:
    return {handle._actor_id.hex() for handle in handles.values() if hasattr(handle, "_actor_id")}


def _told(ref: Any) -> str:
    try:
        return str(ray.get(ref, timeout=0.1))
    except ray.exceptions.RayError as error:
        return f"the host says nothing: {error}\n"
