"""Going on whatever happens: controller.*, health.*, time limits."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from knobs.table import Actors, Bench, entry
from rlsys.cluster import processes
from rlsys.config.errors import UserError
from rlsys.controller import watchdog
from rlsys.controller.clock import TimeIsUp
from rlsys.controller.sources import Source, StreamSource, SyncSource, make_source
from rlsys.controller.stream import Pools
from rlsys.tracking.ledger import Ledger
from rlsys.workers.fleet import Fleet
from rlsys.workers.under_way import under_way
from rlsys.workers.waits import ActorLost, Call, StopFlag

CORRECTED = "algorithm.loss=decoupled_ppo"


def source(bench: Bench, *overrides: str) -> Source:
    inputs = bench.inputs(*overrides)
    actors: Any = Actors()
    pools = Pools(actors, actors, None, actors)
    ledger = Ledger(bench.tmp / "ledger.jsonl")
    options: dict[str, Any] = {"check": lambda _: None, "recorded_rows": 0, "outstanding": ()}
    return make_source(inputs.config, pools, inputs.prompts, ledger, StopFlag(), **options)


@entry("controller.kind")
def kind(bench: Bench) -> None:
    assert isinstance(source(bench, "controller=sync"), SyncSource)
    assert isinstance(source(bench, "controller=async", CORRECTED), StreamSource)
    assert isinstance(source(bench, "controller=one_step_off", CORRECTED), StreamSource)


@entry("controller.max_staleness")
def max_staleness(bench: Bench) -> None:
    def room(bound: int) -> int:
        """Groups that may be handed out before anything is trained."""
        made = source(bench, "controller=async", CORRECTED, f"controller.max_staleness={bound}")
        assert isinstance(made, StreamSource)
        return made.stream.buffer.room

    per_step = bench.config().data.prompts_per_step
    assert [room(bound) for bound in (1, 4)] == [2 * per_step, 5 * per_step]


@entry("controller.in_flight")
def in_flight(bench: Bench) -> None:
    """What a job asks of its samplers at an update."""
    for choice in ("finish", "keep", "recompute"):
        with bench.job("controller=async", CORRECTED, f"controller.in_flight={choice}") as job:
            seen: list[str] = []
            job.source = source(bench, "controller=async", CORRECTED, f"controller.in_flight={choice}")
            bench.monkeypatch.setattr(job.source, "advance", lambda version: None)
            job._weights = lambda version, in_flight, seen=seen: seen.append(in_flight) or {}  # type: ignore
            job.sync_weights()
            assert seen == [choice]


@entry("controller.uncorrected")
def uncorrected(bench: Bench) -> None:
    with pytest.raises(UserError, match="nothing corrects"):
        bench.config("controller=async")
    assert bench.config("controller=async", "controller.uncorrected=true")


class _Pinged:
    """Stands for a group of one actor that never answers: what a fleet asks of it is recorded."""

    role = "reward"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.spec = SimpleNamespace(name="reward worker 0", node=None, gpus=0.0)

    def __len__(self) -> int:
        return 1

    def watched_by(self, _: Any) -> None:
        """By whom does not matter."""

    def at(self, _: int) -> Any:
        return self

    def ping(self, _: int) -> Call:
        return self._noted("ping")

    def restart(self, _: int) -> Call:
        return self._noted("restart")

    def kill(self, _: int) -> None:
        self.asked.append("kill")

    def _noted(self, what: str) -> Call:
        self.asked.append(what)
        never: Any = SimpleNamespace(future=Future)
        return Call(never, "reward worker 0", what)


@entry("health.liveness_s", "health.restarts")
def fleet(bench: Bench) -> None:
    def after(seconds: int, *overrides: str) -> list[str]:
        """What was asked of a silent actor in so many seconds, looked at every second."""
        group: Any = _Pinged()
        now = [0.0]
        watched = Fleet(
            group, bench.config(*overrides).health, lambda *_, **__: None, start_s=1e9, clock=lambda: now[0]
        )
        for second in range(seconds + 1):
            now[0] = float(second)
            watched.poll()
        return group.asked

    assert after(60, "health.liveness_s=8") == ["ping", "kill", "restart"]
    assert after(30, "health.liveness_s=40") == ["ping"]
    with pytest.raises(ActorLost, match="allows 0"):
        after(60, "health.liveness_s=8", "health.restarts=0")


# --- the clock ---


@entry("time_limit_minutes", "checkpoint.every_minutes")
def clock(bench: Bench) -> None:
    with bench.job() as job:
        job.begin_step()
        assert not job.clock.checkpoint_due()
    with bench.job("time_limit_minutes=0.001") as job, pytest.raises(TimeIsUp):
        job.begin_step()
    with bench.job("checkpoint.every_minutes=0.001", "checkpoint.every=1000") as job:
        written: list[int] = []
        bench.monkeypatch.setattr(job, "checkpoint", lambda: written.append(job.state.step))
        job.state = replace(job.state, step=7)
        job.checkpoint_if_due()
        assert written == []
        time.sleep(0.1)
        job.checkpoint_if_due()
        assert written == [7]


# --- health ---


def stalled(bench: Bench, *overrides: str) -> tuple[list[str], bool]:
    """What is said about a wait of a second without an answer, and whether the run is asked to stop."""
    said: list[str] = []
    stop = StopFlag()
    bench.monkeypatch.setattr(processes, "of_run", lambda *_, **__: [])
    bench.monkeypatch.setattr(watchdog.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    health = bench.config(*overrides).health
    dog = watchdog.Watchdog(bench.tmp, health, lambda text, **_: said.append(text), stop, dict, local=True)
    pending: Any = {"call": SimpleNamespace(actor="reward worker 0", what="64 rewards")}
    with under_way("reward", pending):
        dog.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not said and health.stall_s < 1:
            time.sleep(0.05)
        dog.close()
    return said, stop.requested_at is not None


@entry("health.stall_s", "health.on_stall")
def stall(bench: Bench) -> None:
    said, stopped = stalled(bench, "health.stall_s=0.1")
    assert "waiting for reward worker 0 (64 rewards)" in said[0]
    assert not stopped
    assert list((bench.tmp / "stalls").glob("*/driver.txt"))
    assert stalled(bench, "health.stall_s=0.1", "health.on_stall=stop")[1]
    assert stalled(bench, "health.stall_s=60") == ([], False)
