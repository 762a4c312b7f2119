"""Prompt groups sampled without waiting for the trainer: one thread of the driver hands them out and takes them in.

    prompts → rollout worker (a call a group) → reward, reference → whole scored groups, ready to be taken

Which groups may be handed out, taken, or are too late is the buffer's business (:mod:`rlsys.controller.buffer`); who
may be given work is the fleets'. The driver moves references and summaries, never tokens.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import ray
import torch

from rlsys.algorithms.filters import kept
from rlsys.batch import DataProto
from rlsys.batch.versions import WeightVersion
from rlsys.config.modes import AsyncController, OneStepOffController, staleness_bound
from rlsys.config.schema import RunConfig
from rlsys.controller.buffer import GroupBuffer, State
from rlsys.controller.group_work import Work, first_of, least_busy, ticket_of
from rlsys.data.sampler import Place, PromptStream
from rlsys.engines.rollout.base import InFlight
from rlsys.tracking.ledger import Ledger, LedgerGroup
from rlsys.workers.experience import Experience
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import ReferenceGroup, RewardGroup, RolloutGroup
from rlsys.workers.reward import RewardSummary
from rlsys.workers.rollout import Cancelled, RolloutSummary, SampleRequest
from rlsys.workers.under_way import Wait, under_way
from rlsys.workers.waits import ActorLost, Call, DeadlineExceeded, StopFlag, fetch

_TICK_S = 0.2  # how often liveness and deadlines are looked at while nothing arrives
_AT_ONCE = 512  # groups under way at one worker; more would wait in its queue, where nobody could give them to another
_SCORING = 4  # calls under way at the reward actor, and at the reference
_TOGETHER = 64  # groups in one of these calls
_SHARED = 16  # prompts that travel together: whoever is asked for one of them unpacks them all
_TRIES = 3  # so often one group's sampling may pass its deadline; then nobody can sample it
_STORE_SHARE = 0.4  # of Ray's object store, that groups may take which nobody has trained on yet
_GONE = (StopIteration, ActorLost)  # of an index that the group of actors does not have any more


@dataclass(frozen=True)
class Taken:
    """What a step is trained on. failures: of all rewards since the step before; scored: samples that they are of."""

    experience: Experience
    metrics: dict[str, float]
    failures: list[dict[str, Any]]
    scored: int


@dataclass(frozen=True)
class Pools:
    """The actors that make experience, and who keeps them alive (None: nobody does)."""

    rollout: RolloutGroup
    reward: RewardGroup
    reference: ReferenceGroup | None
    fleets: Fleets | None = None


@dataclass
class _Since:
    """What happened since the last step was taken."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    scored: int = 0
    recorded: int = 0
    filters: Counter[str] = field(default_factory=Counter)


class Stream:
    """Sampling that goes on while others train.

    Args:
        pools: actors.
        prompts: where they come from; this stream alone draws them.
        outstanding: (row, epoch, attempt) of groups that were handed out before the run was interrupted, and not
            trained: they are handed out again first.
        ledger: is told of every group.
        recorded_rows: so many rows of a step, from the first, come back in full for people to read.
    """

    def __init__(
        self,
        config: RunConfig,
        pools: Pools,
        prompts: PromptStream,
        ledger: Ledger,
        stop: StopFlag,
        *,
        outstanding: Sequence[tuple[int, int, int]] = (),
        recorded_rows: int = 0,
    ):
        assert pools.fleets is not None, "a stream gives work to those that its fleets say are alive"
        self._fleets = pools.fleets
        self._config, self._pools, self._prompts, self._ledger, self._stop = config, pools, prompts, ledger, stop
        self._per_step = config.data.prompts_per_step
        ordered = isinstance(config.controller, OneStepOffController)
        self.buffer = GroupBuffer(self._per_step, staleness_bound(config.controller), ordered=ordered)
        self._left = self._interrupted(outstanding)
        self._work: dict[str, Work] = {}
        # Sets in the order of their entries, and numbers of what is in _work and _calls: nothing here looks at all
        # groups because one has moved.
        self._unsent: dict[str, None] = {}
        self._unscored: dict[str, None] = {}
        self._unreferenced: dict[str, None] = {}
        self._load: Counter[int] = Counter()  # groups under way, by worker
        self._busy: Counter[str] = Counter()  # calls under way, by phase
        self._unread_bytes = 0
        self._calls: dict[ray.ObjectRef, tuple[Call, str, list[tuple[str, int]], float]] = {}
        self._asked: dict[ray.ObjectRef, Call] = {}  # what a watchdog sees of them
        self._wait: Wait | None = None
        self._ended: SimpleQueue[tuple[ray.ObjectRef, Future]] = SimpleQueue()
        self._changed = threading.Condition()
        self._since = _Since()
        self._recorded_rows = recorded_rows
        self._version = WeightVersion(0, 0)
        self._error: BaseException | None = None
        self._last_ready = self._looked = time.monotonic()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._room_bytes = float("inf")

    @property
    def in_flight(self) -> InFlight:
        """What an update of the weights does with sequences under way."""
        controller = self._config.controller
        return controller.in_flight if isinstance(controller, AsyncController) else "finish"

    # --- the trainer's side ---

    def advance(self, version: WeightVersion) -> None:
        """Samplers have new weights. Groups that are too old for them are sampled anew; the first call begins all."""
        with self._changed:
            self.buffer.version = self.buffer.step = version.step
            self._version = version
            late = self.buffer.expired(version.step)
            self._since.counts["late"] += len(late)
            self._cancel(late)
            self._reissue(late, "too late for the bound on staleness")
            if self._thread is None:
                self._room_bytes = _STORE_SHARE * ray.cluster_resources().get("object_store_memory", float("inf"))
                self._thread = threading.Thread(target=self._pump, name="stream", daemon=True)
                self._thread.start()
            else:
                self._hand_out()  # at once: what is sampled while the next step is trained begins before it

    def take(self, step: int) -> Taken:
        """The groups of the next training step, as soon as there are enough.

        Args:
            step: of the trainer's weights.

        Raises:
            DeadlineExceeded: no group has ended for ``deadlines.rollout`` seconds, or one of them passed this deadline
                again and again.
            ActorFailed: an actor raised, or was lost more often than ``health.restarts`` allows.
            StopRequested: ``stop`` was requested.
        """
        began = self._last_ready = time.monotonic()
        with under_way("rollout", self._asked) as self._wait:
            return self._take(step, began)

    def _take(self, step: int, began: float) -> Taken:
        while True:
            # Here and not in the thread: the trainer's ranks must be asked by nobody else meanwhile.
            if stale := self._fleets.rollout.stale():
                self._fleets.catch_up(stale)
            with self._changed:
                if self._error is not None:
                    raise self._error
                self._stop.check()
                keys = self._takeable(step)
                if keys is not None:
                    return self._taken(keys, step, time.monotonic() - began)
                if time.monotonic() - self._last_ready > self._config.deadlines.rollout:
                    raise DeadlineExceeded(self._late())
                self._changed.wait(_TICK_S)

    def trained(self, step: int, lineage: int) -> None:
        """What was taken has become part of the weights of ``step``."""
        with self._changed:
            keys = self.buffer.within(State.TAKEN)
            self._ledger.trained([self._entry(key) for key in keys], step, lineage)
            for key in keys:
                self.buffer.trained(key)
                self._drop(key)
            self.buffer.step = step

    def checkpoint(self, step: int, lineage: int) -> tuple[dict[str, Any], list[list[int]]]:
        """What a run that is resumed from the checkpoint of ``step`` goes on from.

        Returns:
            Where the data stands; (row, epoch, attempt) of the groups that were handed out and are not trained.
        """
        with self._changed:
            keys = self.buffer.within()
            self._ledger.checkpointed([*map(self._entry, keys), *self._left.values()], step, lineage)
            under_way = [[*self._work[key].place, self.buffer[key].attempt + 1] for key in keys]
            return self._prompts.state_dict(), under_way + [[*place, attempt] for place, attempt in self._left]

    def close(self) -> None:
        """Ends the thread, which gives up what is under way; where it hangs in a call of Ray's, as soon as it can."""
        self._closing = True
        if self._thread is not None:
            self._thread.join(10 * _TICK_S)

    def _give_up(self) -> None:
        self._cancel(self.buffer.within(State.IN_FLIGHT))
        for ref in list(self._calls):
            self._no_longer(ref)

    def _interrupted(self, outstanding: Sequence[Sequence[int]]) -> dict[tuple[Place, int], LedgerGroup]:
        """Place and next attempt of groups that an interrupted run left, each with the attempt that it left."""
        places = [((row, epoch), attempt) for row, epoch, attempt in outstanding]
        uids: list[str] = []
        if places:
            uids = list(self._prompts.again([place for place, _ in places]).non_tensor_batch["uid"])
        samples = self._config.rollout.samples_per_prompt
        return {one: LedgerGroup(str(uid), one[1] - 1, samples) for one, uid in zip(places, uids, strict=True)}

    def _takeable(self, step: int) -> list[str] | None:
        keys = self.buffer.take(step)
        allowed = self._per_step * max(self._config.algorithm.max_refills, 1)
        if keys is None and self._since.counts["filtered"] >= allowed:
            # As many prompts have been replaced as may be: the step goes on with what has passed.
            ready = self.buffer.count(State.READY)
            keys = self.buffer.take(step, min(ready, self._per_step)) if ready else None
        return keys

    def _taken(self, keys: list[str], step: int, waited_s: float) -> Taken:
        shards, ages = [], []
        for key in keys:
            work = self._work[key]
            shards.append(work.shard())
            oldest = shards[-1].rollout.oldest_version
            ages.append(step - oldest.step if oldest is not None else 0)
        since, self._since = self._since, _Since()
        metrics = {
            "async/wait_s": waited_s,
            "async/staleness_mean": float(np.mean(ages)),
            "async/staleness_max": float(np.max(ages)),
            "async/groups": float(len(keys)),
            "async/ready": float(self.buffer.count(State.READY)),
            "async/in_flight": float(self.buffer.count(State.IN_FLIGHT)),
            "async/late": float(since.counts["late"]),
            "async/reissued": float(since.counts["reissued"]),
            "async/held_back": float(since.counts["held back"]),
        }
        if self._config.algorithm.filters:
            metrics |= {f"filter/{name}_dropped": float(since.filters[name]) for name in self._config.algorithm.filters}
            metrics |= {"filter/groups": float(len(keys)), "filter/generated": float(since.scored)}
        return Taken(Experience(shards, {"rollout": waited_s}), metrics, since.failures, since.scored)

    def _late(self) -> str:
        under_way = self.buffer.within(State.IN_FLIGHT)
        who = Counter(self._work[key].worker for key in under_way if self._work[key].summary is None)
        names = {worker: "any sampler" if worker < 0 else f"rollout worker {worker}" for worker in who}
        named = "; ".join(f"{names[worker]} ({count} groups)" for worker, count in sorted(who.items())[:8])
        waiting = "" if named else f"the reward or reference of {len(under_way)} groups"
        seconds = self._config.deadlines.rollout
        return f"no group ended within {seconds:g} s in phase 'rollout', waiting for {named or waiting}"

    # --- the thread's side ---

    def _pump(self) -> None:
        try:
            while not self._closing:
                with self._changed:
                    self._look_after()
                    if self._closing:  # meanwhile: what it would be written down in is closed
                        return
                    self._hand_out()
                    self._score()
                try:
                    ref, future = self._ended.get(timeout=_TICK_S)
                except Empty:
                    continue
                with self._changed:
                    self._take_in(ref, future)
                    while not self._ended.empty():
                        self._take_in(*self._ended.get())
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised by whoever takes the next step
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._give_up()

    def _look_after(self) -> None:
        """Liveness of the actors, and deadlines of what they were asked."""
        for fleet in self._fleets.present():
            fleet.poll()
        now, deadlines = time.monotonic(), self._config.deadlines
        if now - self._looked < _TICK_S:
            return
        self._looked = now
        for ref, (call, phase, members, since) in list(self._calls.items()):
            limit = getattr(deadlines, phase)
            if now - since <= limit:
                continue
            error = DeadlineExceeded(f"{call.actor} did not end {call.what} within deadlines.{phase}={limit:g} s")
            self._no_longer(ref)
            self._lost(phase, call, members, error, straggler=True)

    def _hand_out(self) -> None:
        fleet = self._fleets.rollout
        free = [(self._load[index], index) for index in fleet.ready() if self._load[index] < _AT_ONCE]
        places = sum(_AT_ONCE - load for load, _ in free)
        room = min(self.buffer.room, max(0, places - len(self._unsent)))
        # A step's groups are there to be taken, however full the store is; and who was handed out before goes on.
        if room and self._unread_bytes > self._room_bytes and len(self.buffer) >= self._per_step:
            self._since.counts["held back"] += 1
            room = 0
        if room:
            self._draw(room)
        heapq.heapify(free)
        for key in list(islice(self._unsent, places)):
            self._send(key, least_busy(free, self._work[key].shunned, _AT_ONCE))

    def _draw(self, count: int) -> None:
        """New groups, into the buffer; those that an interrupted run left first. What cannot be handed out (the store
        or the disk is full) stays where it was."""
        again = list(islice(self._left, count))
        found: list[tuple[ray.ObjectRef, list[str], list[Place], list[int]]] = []

        def put(batch: DataProto, places: list[Place], attempts: list[int]) -> None:
            found.append((ray.put(batch), [str(uid) for uid in batch.non_tensor_batch["uid"]], places, attempts))

        stood = self._prompts.state_dict()
        try:
            for part in (again[i : i + _SHARED] for i in range(0, len(again), _SHARED)):
                places = [place for place, _ in part]
                put(self._prompts.again(places), places, [attempt for _, attempt in part])
            for missing in range(count - len(again), 0, -_SHARED):
                batch, places = self._prompts.draw(min(missing, _SHARED))
                put(batch, places, [0] * len(places))
            samples = self._config.rollout.samples_per_prompt
            issued = [
                LedgerGroup(uid, attempt, samples)
                for _, uids, _, attempts in found
                for uid, attempt in zip(uids, attempts, strict=True)
            ]
            self._ledger.issued(issued, self._version)
        except BaseException:
            self._prompts.load_state_dict(stood)
            raise
        for one in again:
            del self._left[one]
        for shared, uids, places, attempts in found:
            for row, (uid, place, attempt) in enumerate(zip(uids, places, attempts, strict=True)):
                self.buffer.hand_out(uid, attempt=attempt)
                self._work[uid] = Work(place, shared, row)
                self._unsent[uid] = None

    def _send(self, key: str, worker: int) -> None:
        group, work = self.buffer[key], self._work[key]
        config = self._config
        request = SampleRequest(
            samples=config.rollout.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_tokens=config.data.max_response_tokens,
            run_seed=config.seed,
            attempt=group.attempt,
        )
        ticket = ticket_of(key, group.attempt)
        try:
            call = self._pools.rollout.generate_one(worker, work.prompts, work.row, request, ticket=ticket)
        except _GONE:  # meanwhile, as another thread found out: the next one who is ready has it
            return
        work.worker = worker
        self._load[worker] += 1
        del self._unsent[key]
        self._follow(call, "rollout", [key])

    def _score(self) -> None:
        """Hands sampled groups to the reward actor and the reference, a bounded number at a time."""
        step_rows = self._per_step * self._config.rollout.samples_per_prompt
        while self._unscored and self._busy["reward"] < _SCORING and self._fleets.reward.ready():
            keys = first_of(self._unscored, _TOGETHER)
            shards, wanted = [], []
            for key in keys:
                work = self._work[key]
                columns, summary = work.sampled()
                shards.append(columns)
                wanted.append(min(max(self._recorded_rows - self._since.recorded, 0), len(summary)))
                self._since.recorded += wanted[-1]
            rewards, call = self._pools.reward.score(shards, record_rows=wanted, step_rows=step_rows, payload=None)
            self._follow(call, "reward", keys, payload=rewards)
        fleet = self._fleets.reference
        while self._unreferenced and fleet is not None and self._busy["reference"] < _SCORING and fleet.ready():
            assert self._pools.reference is not None
            keys = first_of(self._unreferenced, _TOGETHER)
            logprobs, call = self._pools.reference.logprobs([self._work[key].sampled()[0] for key in keys])
            self._follow(call, "reference", keys, payload=logprobs)

    def _follow(self, call: Call, phase: str, keys: Sequence[str], payload: Any = None) -> None:
        if payload is not None:
            call = replace(call, payload=payload)
        members = [(key, self.buffer[key].attempt) for key in keys]
        self._calls[call.ref] = (call, phase, members, time.monotonic())
        self._busy[phase] += 1
        if phase == "rollout":
            self._fleets.rollout.busy(call.index)
        self._asked[call.ref] = call
        call.ref.future().add_done_callback(partial(self._note, call.ref))

    def _note(self, ref: ray.ObjectRef, future: Future) -> None:
        self._ended.put((ref, future))

    def _take_in(self, ref: ray.ObjectRef, future: Future) -> None:
        """One call has ended."""
        found = self._no_longer(ref)
        if found is None:
            return  # given up before
        call, phase, members, _ = found
        wanted = [(i, key) for i, (key, attempt) in enumerate(members) if self.buffer.is_expected(key, attempt)]
        try:
            error = future.exception()
            answer = future.result() if error is None else self._raised(error, call, phase, bool(wanted))
        except (ActorLost, DeadlineExceeded) as lost:
            self._lost(phase, call, members, lost)
            return
        if answer is None:
            return
        for index, key in wanted:
            if phase == "rollout":
                self._sampled(key, call.payload, answer)
            elif phase == "reward":
                self._rewarded(key, call.payload[index], answer[index])
            else:
                self._work[key].reference = call.payload[index]
                self._settle(key)

    def _no_longer(self, ref: ray.ObjectRef) -> tuple[Call, str, list[tuple[str, int]], float] | None:
        """The call is not waited for any more. Returns what was known of it."""
        self._asked.pop(ref, None)
        if self._wait is not None:
            self._wait.answered()
        found = self._calls.pop(ref, None)
        if found is not None:
            call, phase, *_ = found
            self._busy[phase] -= 1
            if phase == "rollout":
                self._fleets.rollout.done(call.index)
        return found

    def _raised(self, error: BaseException, call: Call, phase: str, wanted: bool) -> Any:
        """Raises what a call failed with; None where nobody waits for it: it was cancelled."""
        if isinstance(getattr(error, "cause", None), Cancelled) and not wanted:
            return None
        return fetch(call, phase, getattr(self._config.deadlines, phase), time.monotonic())

    def _sampled(self, key: str, columns: ray.ObjectRef, summary: RolloutSummary) -> None:
        work = self._work[key]
        self._load[work.worker] -= 1
        work.columns, work.summary = columns, summary
        self._unread_bytes += work.unread_bytes
        self._ledger.received([self._entry(key)])
        self._unscored[key] = None
        if self._pools.reference is not None:
            self._unreferenced[key] = None

    def _rewarded(self, key: str, columns: ray.ObjectRef, summary: RewardSummary) -> None:
        work, since = self._work[key], self._since
        work.reward = (columns, summary)
        since.failures += summary.failures
        since.scored += len(summary.rewards)
        filters = self._config.algorithm.filters
        tired = since.counts["filtered"] >= self._per_step * (self._config.algorithm.max_refills + 1)
        if filters and not tired:
            keep, counts = kept(filters, torch.tensor(summary.rewards), [key] * len(summary.rewards))
            if not keep[0]:
                since.counts["filtered"] += 1
                since.filters.update(counts)
                self._ledger.filtered([self._entry(key)], ", ".join(name for name, number in counts.items() if number))
                self.buffer.drop(key)
                self._drop(key)
                self._last_ready = time.monotonic()  # it has ended, too
                return
        self._settle(key)

    def _settle(self, key: str) -> None:
        """The group is ready when everything is there that will be asked of it."""
        work = self._work.get(key)
        if work is None or work.reward is None or (self._pools.reference is not None and work.reference is None):
            return
        self.buffer.ready(key)
        self._last_ready = time.monotonic()

    def _lost(
        self, phase: str, call: Call, members: Sequence[tuple[str, int]], error: Exception, straggler: bool = False
    ) -> None:
        """An actor is gone, or did not answer in time: what it was asked is asked again.

        Raises:
            ActorFailed: it was lost too often.
            DeadlineExceeded: these samples were late too often.
        """
        keys = [key for key, attempt in members if self.buffer.is_expected(key, attempt)]
        if phase == "rollout":
            self._fleets.rollout.reissued(len(keys))
            self._since.counts["reissued"] += len(keys)
            if straggler:  # the sampler answers others; one that does not is found by its silence
                self._cancel(keys)
                for key in keys:
                    self._work[key].late += 1
                    if self._work[key].late >= _TRIES:
                        raise error
                self._last_ready = time.monotonic()  # who has it now is given as long
            self._reissue(keys, str(error).splitlines()[0])
            if straggler:
                return
            self._fleets.rollout.lost(call.index, error, life=call.life, phase=phase)
            return
        fleet = self._fleets.reward if phase == "reward" else self._fleets.reference
        assert fleet is not None
        fleet.lost(call.index, error, life=call.life, phase=phase)
        waiting = self._unscored if phase == "reward" else self._unreferenced
        waiting.update(dict.fromkeys(keys))

    def _reissue(self, keys: Sequence[str], why: str) -> None:
        """From the beginning, by another worker where there is one."""
        if not keys:
            return
        self._ledger.reissued([self._entry(key) for key in keys], why)
        for key in keys:
            self.buffer.reissue(key)
            work = self._drop(key)
            self._work[key] = Work(work.place, work.prompts, work.row, shunned=work.worker, late=work.late)
            self._unsent[key] = None
        self._ledger.issued([self._entry(key) for key in keys], self._version)

    def _drop(self, key: str) -> Work:
        """Nothing that was done for this group counts any more."""
        work = self._work.pop(key)
        if work.under_way:
            self._load[work.worker] -= 1
        self._unread_bytes -= work.unread_bytes
        for waiting in (self._unsent, self._unscored, self._unreferenced):
            waiting.pop(key, None)
        return work

    def _cancel(self, keys: Sequence[str]) -> None:
        """Tells the samplers that nobody waits for these any more. Their answers are not waited for."""
        by_worker: dict[int, list[str]] = {}
        for key in keys:
            if self._work[key].under_way:
                by_worker.setdefault(self._work[key].worker, []).append(ticket_of(key, self.buffer[key].attempt))
        for worker, tickets in by_worker.items():
            with suppress(*_GONE):
                self._pools.rollout.cancel(worker, tickets)

    def _entry(self, key: str) -> LedgerGroup:
        return LedgerGroup(key, self.buffer[key].attempt, self._config.rollout.samples_per_prompt)
