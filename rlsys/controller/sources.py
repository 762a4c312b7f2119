"""Where a step's experience comes from: the modes of the controller as a few hooks around one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rlsys.batch import DataProto
from rlsys.batch.versions import WeightVersion
from rlsys.config.modes import SyncController
from rlsys.config.schema import RunConfig
from rlsys.controller.collecting import Collector, Prompts
from rlsys.controller.stream import Pools, Stream
from rlsys.data.sampler import PromptStream
from rlsys.engines.rollout.base import InFlight
from rlsys.tracking.ledger import Ledger, LedgerGroup
from rlsys.workers.experience import Experience
from rlsys.workers.waits import StopFlag


@dataclass(frozen=True)
class Collected:
    """A step's experience. baselines: reward [B] of each sample's greedy response, where the estimator reads it.
    failures: rewards that failed, of ``scored`` samples, that nobody has been told about yet."""

    experience: Experience
    baselines: np.ndarray | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    scored: int = 0


class Source(Protocol):
    """What the loop asks for experience.

    in_flight: what an update of the weights does with sequences under way.
    """

    in_flight: InFlight

    def advance(self, version: WeightVersion) -> None:
        """All samplers have these weights."""
        ...

    def next(self, step: int) -> Collected:
        """The experience of the next step. step: of the trainer's weights."""
        ...

    def trained(self, step: int, lineage: int) -> None:
        """What :meth:`next` gave last has become part of the weights of ``step``."""
        ...

    def checkpoint(self, step: int, lineage: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state of the data, and more state (JSON), that a run resumed from this step begins with."""
        ...

    def close(self) -> None:
        """Gives up what is under way."""
        ...


class SyncSource:
    """A step's prompts are sampled when the step begins, from the weights that it trains."""

    in_flight: InFlight = "finish"

    def __init__(
        self, config: RunConfig, prompts: PromptStream, ledger: Ledger, collector: Callable[[Prompts], Collector]
    ):
        self._source, self._ledger = prompts, ledger
        self._prompts = _Noted(prompts, ledger, config.rollout.samples_per_prompt)
        self._collector = collector(self._prompts)
        self._state = prompts.state_dict()
        self._kept: set[str] = set()

    def advance(self, version: WeightVersion) -> None:
        self._prompts.version = version

    def next(self, step: int) -> Collected:
        prompts = self._prompts.next_batch()
        experience, baselines, metrics = self._collector.step(prompts)
        self._ledger.received(list(self._prompts.outstanding.values()))
        self._kept = set(experience.rollout("uids"))
        return Collected(experience, baselines, metrics)

    def trained(self, step: int, lineage: int) -> None:
        drawn = self._prompts.outstanding
        # Only now: a step that is interrupted draws all of its prompts again.
        if filtered := [group for uid, group in drawn.items() if uid not in self._kept]:
            self._ledger.filtered(filtered, ", ".join(self._collector.config.algorithm.filters))
        self._ledger.trained([group for uid, group in drawn.items() if uid in self._kept], step, lineage)
        self._prompts.outstanding.clear()
        self._state = self._source.state_dict()

    def checkpoint(self, step: int, lineage: int) -> tuple[dict[str, Any], dict[str, Any]]:
        # Of a step that has begun: its prompts come after the position that is saved, and are drawn again.
        self._ledger.checkpointed(list(self._prompts.outstanding.values()), step, lineage)
        return self._state, {}

    def close(self) -> None:
        """Nothing is under way between two calls."""


class _Noted:
    """A run's prompts; the ledger is told of each one. outstanding: by uid, those that nobody was trained on yet."""

    def __init__(self, prompts: PromptStream, ledger: Ledger, samples: int):
        self._prompts, self._ledger, self._samples = prompts, ledger, samples
        self.version = WeightVersion(0, 0)
        self.outstanding: dict[str, LedgerGroup] = {}

    def next_batch(self, count: int | None = None) -> DataProto:
        batch = self._prompts.next_batch(count)
        groups = [LedgerGroup(str(uid), 0, self._samples) for uid in batch.non_tensor_batch["uid"]]
        self._ledger.issued(groups, self.version)
        self.outstanding |= {group.uid: group for group in groups}
        return batch


class StreamSource:
    """Prompts are sampled all the time; a step takes groups that have ended."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.in_flight: InFlight = stream.in_flight

    def advance(self, version: WeightVersion) -> None:
        self.stream.advance(version)

    def next(self, step: int) -> Collected:
        taken = self.stream.take(step)
        return Collected(taken.experience, None, taken.metrics, taken.failures, taken.scored)

    def trained(self, step: int, lineage: int) -> None:
        self.stream.trained(step, lineage)

    def checkpoint(self, step: int, lineage: int) -> tuple[dict[str, Any], dict[str, Any]]:
        data, outstanding = self.stream.checkpoint(step, lineage)
        return data, {"outstanding": outstanding}

    def close(self) -> None:
        self.stream.close()


def make_source(
    config: RunConfig,
    pools: Pools,
    prompts: PromptStream,
    ledger: Ledger,
    stop: StopFlag,
    *,
    check: Callable[[Experience], None],
    recorded_rows: int,
    outstanding: Sequence[tuple[int, int, int]],
) -> Source:
    """What ``config.controller`` says. The arguments are those of ``Collector`` and ``Stream``."""
    if not isinstance(config.controller, SyncController):
        stream = Stream(
            config,
            pools,
            prompts,
            ledger,
            stop,
            outstanding=outstanding,
            recorded_rows=recorded_rows,
        )
        return StreamSource(stream)

    def collector(noted: Prompts) -> Collector:
        return Collector(
            config, pools.rollout, pools.reward, pools.reference, noted, stop, check, recorded_rows, pools.fleets
        )

    return SyncSource(config, prompts, ledger, collector)
