"""A sampler and a trainer that take time and compute nothing, inside real actors, for benchmarks of the controller.

The sampler batches continuously: it has so many slots, a sequence that ends makes room for the next in its queue, and a
token of every sequence under way takes as long as the number of these says. Everything around it is the real thing:
``RolloutWorker`` with its environment, tickets and updates; the worker groups; the controller.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlsys.batch import DataProto
from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import RolloutConfig
from rlsys.engines.rollout.base import InFlight, Parcel, Sample, SamplingParams
from rlsys.environments.base import ENVIRONMENTS
from rlsys.tracking.meter import Metered
from rlsys.workers.reward import RewardSummary
from rlsys.workers.rollout import RolloutWorker
from rlsys.workers.weights import WeightIntake

SIGMA, CAP = 1.0, 8.0  # of a response's length: lognormal, cut at so many times its mean
ALONE = 0.75  # a token of one sequence alone takes this share of the time that it takes with all slots full


@dataclass(frozen=True)
class Timing:
    """slots: sequences that a sampler decodes at once; mean_tokens: of a response, before the cut; token_s: seconds of
    a token with all slots full; update_s: that an update of the weights holds a sampler up."""

    slots: int
    mean_tokens: int
    token_s: float
    update_s: float

    def at(self, sequences: int) -> float:
        """Seconds of a token with so many sequences under way: reading the weights takes as long for one as for all,
        the rest grows with them."""
        return self.token_s * (ALONE + (1 - ALONE) * sequences / self.slots)


def response_tokens(seed: int, mean: float) -> int:
    """Length of the response that a seed gives."""
    drawn = float(np.random.default_rng(seed).lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA))
    return max(1, round(min(drawn, CAP * mean)))


class SimulatedEngine:
    """A :class:`rlsys.engines.rollout.base.RolloutEngine` that waits."""

    def __init__(self, timing: Timing):
        self.version = WeightVersion(0, 0)
        self._timing = timing
        self._slots = asyncio.Semaphore(timing.slots)
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: dict[int, asyncio.Future[None]] = {}
        self._ends: list[tuple[float, int]] = []  # (progress at which it ends, number), a heap
        self._numbers = itertools.count()
        self._progress = 0.0  # tokens that a sequence which has always been there has by now
        self._paused = False
        self._at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._history: list[tuple[float, WeightVersion]] = [(0.0, self.version)]  # version from this progress on
        self._sampled = 0.0
        self.slot_s = 0.0
        """Seconds that slots have been busy, added up."""

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        tokens = min(response_tokens(params.seed, self._timing.mean_tokens), params.max_tokens)
        async with self._slots:
            await self._open.wait()
            self._advance()
            number, began = next(self._numbers), self._progress
            ended = asyncio.get_running_loop().create_future()
            self._running[number] = ended
            self._idle.clear()
            heapq.heappush(self._ends, (began + tokens, number))
            self._schedule()
            try:
                await ended
            finally:
                self._advance()
                del self._running[number]
                if not self._running:
                    self._idle.set()
                self._schedule()
        versions = self._versions(began, tokens)
        return Sample([1] * tokens, [-1.0] * tokens, versions, "stop")

    def sampled_tokens(self) -> int:
        return int(self._sampled)

    async def gpus(self) -> list[str]:
        return []

    async def checksum(self) -> str:
        return str(self.version.packed())

    async def update_weights(
        self, buckets: Iterable[Parcel], version: WeightVersion, in_flight: InFlight = "finish"
    ) -> str:
        """``recompute`` takes as long as ``keep``: what it computes anew is not simulated."""
        self._open.clear()
        if in_flight == "finish":
            await self._idle.wait()
        self._advance()
        self._paused = True
        self._schedule()
        await asyncio.sleep(self._timing.update_s)
        self._at = time.monotonic()
        self._paused = False
        self.version = version
        self._history.append((self._progress, version))
        self._schedule()
        self._open.set()
        return await self.checksum()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _advance(self) -> None:
        """Brings progress up to now. Slots are busy while sequences decode, not while an update holds them up."""
        now = time.monotonic()
        if not self._paused and self._running:
            tokens = (now - self._at) / self._timing.at(len(self._running))
            self._progress += tokens
            self._sampled += tokens * len(self._running)
            self.slot_s += (now - self._at) * len(self._running)
        self._at = now

    def _schedule(self) -> None:
        """Wakes up when the next sequence ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ends and self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)  # given up
        if self._ends and not self._paused:
            delay = (self._ends[0][0] - self._progress) * self._timing.at(len(self._running))
            self._timer = asyncio.get_running_loop().call_later(max(delay, 0.0), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        while self._ends and self._ends[0][0] <= self._progress + 1e-9:
            ended = self._running.get(heapq.heappop(self._ends)[1])
            if ended is not None and not ended.done():
                ended.set_result(None)
        self._schedule()

    def _versions(self, began: float, tokens: int) -> list[WeightVersion]:
        starts = [start for start, _ in self._history]
        return [self._history[bisect.bisect_right(starts, began + i) - 1][1] for i in range(tokens)]


class SimulatedSampler(RolloutWorker):
    """The real worker, around the simulated engine."""

    def begin(self, config: RolloutConfig, timing: Timing) -> None:
        self._config, self._home = config, asyncio.get_running_loop()
        self.engine = SimulatedEngine(timing)
        self._engine = self.engine  # type: ignore[assignment] # neither sleeps nor meets a trainer
        self._intake = WeightIntake()
        self._environment = ENVIRONMENTS.get(config.environment, where="rollout.environment")()


class SimulatedHost:
    """One process with several samplers, each of which is called by its number."""

    async def begin(self, count: int, config: RolloutConfig, timing: Timing) -> None:
        torch.set_num_threads(1)
        self._samplers = [SimulatedSampler() for _ in range(count)]
        for sampler in self._samplers:
            sampler.begin(config, timing)

    async def on(self, sampler: int, verb: str, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._samplers[sampler], verb)(*args, **kwargs)

    async def slot_s(self) -> float:
        """Seconds that the slots of all samplers here have been busy, added up."""
        for sampler in self._samplers:
            sampler.engine._advance()
        return sum(sampler.engine.slot_s for sampler in self._samplers)


@dataclass(frozen=True)
class Logical:
    """One sampler of a host as if it were an actor of its own."""

    host: Any
    sampler: int

    def __getattr__(self, verb: str) -> _Verb:
        return _Verb(self, verb)


@dataclass(frozen=True)
class _Verb:
    target: Logical
    verb: str
    num_returns: int = 1

    def options(self, *, num_returns: int) -> _Verb:
        return _Verb(self.target, self.verb, num_returns)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        method = self.target.host.on.options(num_returns=self.num_returns)
        return method.remote(self.target.sampler, self.verb, *args, **kwargs)


class SimulatedTrainer(Metered, verbs=("forward_backward",)):
    """One rank whose gradient takes so many seconds. Its rows come as references, and stay where they are."""

    def __init__(self, step_s: float):
        self._step_s = step_s

    def load_batch(self, *_: Any, **__: Any) -> None:
        pass

    def forward_backward(self, *_: Any, **__: Any) -> dict[str, float]:
        time.sleep(self._step_s)
        return {"train/loss": 0.0, "train/tokens": 1.0, "policy/loss": 0.0}

    def optim_step(self) -> dict[str, float]:
        return {"train/grad_norm": 1.0, "train/lr": 1e-6, "train/skipped": 0.0}


class InstantReward(Metered, verbs=("score",)):
    """Every third sample of a group is right."""

    def score(self, record_rows: list[int], step_rows: int, train: bool, *shards: DataProto) -> tuple[Any, ...]:
        rewards = [(torch.arange(len(shard)) % 3 == 0).float() for shard in shards]
        columns = [DataProto.from_dict(tensors={"rewards": values}) for values in rewards]
        return *columns, [RewardSummary(v.numpy(), {"correct": v.double().numpy()}, [], []) for v in rewards]
