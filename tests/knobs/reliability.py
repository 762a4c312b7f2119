"""Going on whatever happens: controller.*, health.*, time limits."""

from __future__ import annotations

from typing import Any

import pytest

from knobs.table import Actors, Bench, entry
from rlsys.config.errors import UserError
from rlsys.controller.sources import Source, StreamSource, SyncSource, make_source
from rlsys.controller.stream import Pools
from rlsys.tracking.ledger import Ledger
from rlsys.workers.waits import StopFlag

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
