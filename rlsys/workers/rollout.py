"""RolloutWorker: the actor around a rollout engine and its environments."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError

from rlsys.algorithms.collapse import repetition
from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import LoraConfig, RolloutConfig
from rlsys.engines.rollout import RolloutEngine, start_engine
from rlsys.engines.rollout.base import InFlight, Rest
from rlsys.engines.sync.broadcast import Meeting
from rlsys.engines.sync.cuda_ipc import IpcBucket, close_mapping
from rlsys.environments.base import ENVIRONMENTS, Environment
from rlsys.environments.play import SamplingSettings, play_group, trajectories_to_batch
from rlsys.tracking.meter import Metered, Reading
from rlsys.workers.weights import Host, SentWeights, TakenWeights, WeightIntake


@dataclass(frozen=True)
class SampleRequest:
    """What to do with a shard of prompts.

    samples: responses a prompt; temperature 0 is greedy; run_seed and attempt: parts of each sample's seed;
    max_tokens: longest response.
    """

    samples: int
    temperature: float
    max_tokens: int
    run_seed: int
    attempt: int = 0


@dataclass(frozen=True)
class RolloutSummary:
    """What the driver sees of a shard: one entry a row, no tokens.

    uids [B] str; prompt_lengths, response_lengths, sampled_tokens [B] int64; finish_reasons [B] str;
    oldest_version: of all sampled tokens; None: there are none.
    repetition [B] float32: share of a response's 4-grams of sampled tokens that occurred in it before.
    """

    uids: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    sampled_tokens: np.ndarray
    finish_reasons: np.ndarray
    oldest_version: WeightVersion | None
    repetition: np.ndarray

    def __len__(self) -> int:
        return len(self.uids)


class Cancelled(Exception):
    """The call's ticket was cancelled: nothing of it is under way any more, and there is no answer."""


@dataclass(frozen=True)
class Progress:
    """tickets: of the calls under way, in order. sampled_tokens: since the start; a sampler that has work and whose
    number stands still is stuck."""

    tickets: tuple[str, ...]
    sampled_tokens: int


CONCURRENCY_GROUPS = {"control": 64}

P = ParamSpec("P")
T = TypeVar("T")


def _control(
    method: Callable[Concatenate[RolloutWorker, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[RolloutWorker, P], Coroutine[Any, Any, T]]:
    """A method that is answered however many ``generate`` calls wait to be begun. Ray gives the group a thread with an
    event loop of its own; the method runs in the loop that the engine lives in."""

    @functools.wraps(ray.method(concurrency_group="control")(method))  # Ray looks for its mark on what is wrapped
    async def at_home(self: RolloutWorker, *args: P.args, **kwargs: P.kwargs) -> T:
        home = self._home
        if home is None or home is asyncio.get_running_loop():
            return await method(self, *args, **kwargs)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(method(self, *args, **kwargs), home))

    return at_home


class RolloutWorker(Metered, verbs=("generate",)):
    """One sampler. All methods are coroutines of one event loop, so shards and environments overlap; but ``ping``,
    ``progress`` and ``clock`` answer from a thread of their own, whatever that loop is busy with.

    As an actor it is made with ``ray.remote(concurrency_groups=CONCURRENCY_GROUPS)``.
    """

    def __init__(self) -> None:
        self._home: asyncio.AbstractEventLoop | None = None
        self._engine: RolloutEngine | None = None
        self._tickets: dict[str, set[asyncio.Future[None]]] = {}  # of calls under way: what ends them

    async def start(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        max_length: int,
        seed: int,
        threads: int,
        adapter: LoraConfig | None = None,
        sleeps: bool = False,
    ) -> None:
        """Loads the sampler. adapter: it will be sent; None: whole weights. sleeps: it takes turns with the trainer,
        whose turn is first."""
        self._config, self._home = config, asyncio.get_running_loop()
        engine = await start_engine(
            model_path, config, max_length=max_length, seed=seed, threads=threads, adapter=adapter, sleeps=sleeps
        )
        self._intake = WeightIntake()
        if sleeps:
            await engine.sleep()
        self._engine = engine
        self._environment: Environment = ENVIRONMENTS.get(config.environment, where="rollout.environment")()

    async def generate(
        self, prompts: DataProto, first: int, last: int, request: SampleRequest, ticket: str | None = None
    ) -> tuple[DataProto, RolloutSummary]:
        """Plays ``request.samples`` samples of every prompt from row ``first`` up to ``last``, which is not played.
        When new weights come half-way (``update_weights``), what is under way goes on: one answer may hold tokens of
        several versions, and none of it has to be asked for again.

        Args:
            prompts: columns uid, prompt_ids, task; one row a prompt.
            ticket: by which it can be cancelled; several calls may have the same.

        Returns:
            The rollout columns, whole groups in the order of the prompts, and what the driver needs to know of them.

        Raises:
            Cancelled: its ticket was.
        """
        playing = asyncio.ensure_future(self._play(prompts, first, last, request))
        if ticket is None:
            return await playing
        given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tickets.setdefault(ticket, set()).add(given_up)
        try:
            # An environment may take its time to end; the answer does not.
            either: set[asyncio.Future[Any]] = {playing, given_up}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                raise Cancelled(f"the call with ticket {ticket} was cancelled")
            return playing.result()
        finally:
            playing.cancel()
            self._tickets[ticket].discard(given_up)
            if not self._tickets[ticket]:
                del self._tickets[ticket]

    @_control
    async def cancel(self, tickets: Sequence[str]) -> None:
        """Gives up the calls under way with these tickets: they raise :class:`Cancelled`, and the engine drops their
        sequences. A ticket that no call under way has is ignored."""
        for ticket in tickets:
            for given_up in self._tickets.get(ticket, ()):
                if not given_up.done():
                    given_up.set_result(None)

    @ray.method(concurrency_group="control")
    async def ping(self) -> None:
        """Answers: the process is alive."""

    @ray.method(concurrency_group="control")
    async def progress(self) -> Progress:
        engine = self._engine
        return Progress(tuple(sorted(self._tickets.copy())), 0 if engine is None else engine.sampled_tokens())

    async def _play(
        self, prompts: DataProto, first: int, last: int, request: SampleRequest
    ) -> tuple[DataProto, RolloutSummary]:
        prompts = prompts.slice(first, last)
        check_columns(prompts, ("uid", "prompt_ids", "task"), "rollout")
        settings = SamplingSettings(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            stop=tuple(self._config.stop),
            stop_token_ids=tuple(self._config.stop_token_ids),
        )
        prompt_rows = [row.tolist() for row in jagged.to_rows(prompts.batch["prompt_ids"])]
        engine = self._started()
        groups = await asyncio.gather(
            *(
                play_group(
                    self._environment,
                    prompt_ids,
                    prompts.non_tensor_batch["task"][i],
                    uid=prompts.non_tensor_batch["uid"][i],
                    samples=request.samples,
                    engine=engine,
                    settings=settings,
                    run_seed=request.run_seed,
                    attempt=request.attempt,
                )
                for i, prompt_ids in enumerate(prompt_rows)
            )
        )
        batch = trajectories_to_batch(prompts, groups)
        return batch, summarize(batch)

    @_control
    async def offer_weights(self, bucket: IpcBucket | None) -> None:
        """Hands over one bucket of the update under way, and returns when it has been read; None: that was all."""
        await asyncio.wrap_future(self._intake.offer(bucket))

    @_control
    async def host(self) -> Host:
        return Host.here(await self._started().gpus())

    @_control
    async def update_weights(
        self, sent: SentWeights, version: WeightVersion, in_flight: InFlight = "finish"
    ) -> TakenWeights:
        """Takes new weights. in_flight: what becomes of sequences under way (``RolloutEngine.update_weights``)."""
        engine = self._started()
        with self.meter.during("update_weights"):
            try:
                checksum = await engine.update_weights(self._intake.open(sent), version, in_flight)
            except BaseException as error:
                self._intake.abandon(error)
                if isinstance(error.__cause__, RayActorError | ObjectLostError):
                    raise error.__cause__ from error  # who sent them is gone: nothing is wrong with what was sent
                raise
            finally:
                close_mapping()
            return TakenWeights(checksum, dict(getattr(engine, "last_update_s", {})))

    @_control
    async def sleep(self, *, weights: bool) -> Rest:
        with self.meter.during("sleep"):
            return await self._started().sleep(weights=weights)

    @_control
    async def wake(self) -> Rest:
        with self.meter.during("wake"):
            return await self._started().wake()

    @_control
    async def join_trainer(self, meeting: Meeting) -> None:
        """Meets trainer rank 0 for broadcasts of weights between GPUs."""
        await self._started().join_trainer(meeting)  # type: ignore[attr-defined]

    @_control
    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    @_control
    async def take_reading(self) -> Reading:  # type: ignore[override] # an actor's answer either way
        return self.meter.take()

    @ray.method(concurrency_group="control")
    async def clock(self) -> float:
        return time.time()

    def _started(self) -> RolloutEngine:
        assert self._engine is not None, "the worker was asked before it was started"
        return self._engine


def summarize(batch: DataProto) -> RolloutSummary:
    """The driver's view of a shard with the rollout columns."""
    columns: Any = batch.batch
    mask = columns["response_mask"]
    chosen = jagged.values(mask)
    versions = jagged.values(columns["weight_version"])[chosen]
    sampled = jagged.segment_sum(mask)
    return RolloutSummary(
        uids=batch.non_tensor_batch["uid"],
        prompt_lengths=jagged.lengths(columns["prompt_ids"]).numpy(),
        response_lengths=jagged.lengths(mask).numpy(),
        sampled_tokens=sampled.numpy(),
        finish_reasons=batch.non_tensor_batch["finish_reason"],
        oldest_version=WeightVersion.unpack(int(versions.min())) if len(versions) else None,
        repetition=repetition(jagged.values(columns["response_ids"])[chosen], sampled).numpy(),
    )
