"""Worker groups: the driver's side of the four kinds of actor. They hand out calls and know every deadline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlsys.algorithms.kl import KLEstimator
from rlsys.algorithms.objective import Objective, StepSettings
from rlsys.algorithms.requirements import needs_teacher
from rlsys.batch import DataProto
from rlsys.batch.versions import WeightVersion
from rlsys.cluster.placement import ActorSpec
from rlsys.cluster.session import Placement
from rlsys.config.errors import UserError
from rlsys.config.sampler import sampled_adapter, sampler_ranks
from rlsys.config.schema import DeadlineConfig, DistillationConfig, ModelConfig, RunConfig, TrainerConfig
from rlsys.engines.rollout.base import InFlight, Rest
from rlsys.engines.sync.broadcast import Meeting
from rlsys.engines.sync.buckets import Entry
from rlsys.engines.sync.cuda_ipc import IpcBucket
from rlsys.engines.sync.verify import check_sync
from rlsys.workers.actors import Actor, Group
from rlsys.workers.reference import ReferenceWorker
from rlsys.workers.reward import ContextSettings, RewardSummary, RewardWorker
from rlsys.workers.rollout import CONCURRENCY_GROUPS, RolloutSummary, RolloutWorker, SampleRequest
from rlsys.workers.trainer import AdvantageSummary, ForwardSummary, Slice, TokenAdvantagesRequest, TrainerWorker
from rlsys.workers.waits import Call, StopFlag
from rlsys.workers.weights import Host, SendRequest, SentWeights, TakenWeights


class RolloutGroup(Group):
    role, worker, concurrency_groups = "rollout", RolloutWorker, CONCURRENCY_GROUPS

    def __init__(self, placement: Placement, deadlines: DeadlineConfig, stop: StopFlag):
        super().__init__(placement, deadlines, stop, max_concurrency=1000)
        self._sampler_checksum: str | None = None
        self._sender_checksum: str | None = None
        self._broadcast_index: list[Entry] | None = None
        self._met: dict[int, int] | None = None  # lives of the samplers that met the trainer
        self._ranks_per_sampler = 1

    def starting(self, config: RunConfig, max_length: int) -> list[Call]:
        self._ranks_per_sampler = sampler_ranks(config.rollout)

        def start(a: Actor) -> Call:
            return a.call(
                "start",
                config.model.path,
                config.rollout,
                max_length=max_length,
                seed=config.seed,
                threads=a.spec.threads,
                adapter=sampled_adapter(config),
                sleeps=config.cluster.placement == "colocated",
                what="loading the sampler",
            )

        return self._starts(start)

    def generate(self, index: int, prompts: ray.ObjectRef, rows: range, request: SampleRequest) -> Call:
        """One shard, by this worker; the payload is the reference of its columns.

        Args:
            prompts: reference of a batch of prompts; rows: which of them.
        """
        actor = self.at(index)
        verb = actor.handle.generate.options(num_returns=2)
        columns, summary = verb.remote(prompts, rows.start, rows.stop, request)
        return actor.called(summary, f"{len(rows) * request.samples} responses", columns)

    def generate_one(
        self, index: int, prompts: ray.ObjectRef, row: int, request: SampleRequest, *, ticket: str
    ) -> Call:
        """One prompt group, by this worker; the payload is the reference of its columns.

        Args:
            prompts: reference of a batch of prompts; row: which of them. ticket: by which it can be cancelled.
        """
        actor = self.at(index)
        verb = actor.handle.generate.options(num_returns=2)
        columns, summary = verb.remote(prompts, row, row + 1, request, ticket)
        return actor.called(summary, f"{request.samples} responses ({ticket})", columns)

    def cancel(self, index: int, tickets: Sequence[str]) -> None:
        """Tells this worker that nobody waits for these any more. Its answer is not waited for."""
        self.at(index).handle.cancel.remote(list(tickets))

    def forget_sender(self) -> None:
        """The next weights come from another trainer, whom the samplers have not met."""
        self._broadcast_index = self._met = None

    def lives(self) -> dict[int, int]:
        """Of the samplers that can be reached, by index: which of its processes each is."""
        return {actor.spec.index: actor.life for actor in self.reached()}

    @property
    def meets(self) -> bool:
        """Whether all samplers are those that meet the trainer, or met it: a group for broadcasts has fixed members."""
        return len(self.reached()) == len(self) and self._met in (None, self.lives())

    def sleep(self, *, weights: bool) -> list[Rest]:
        """Every sampler gives memory back (``RolloutEngine.sleep``)."""
        calls = [a.call("sleep", weights=weights, what="its memory") for a in self.reached()]
        return [rest for _, rest in self._answers(calls, "sync", stop=False)]

    def wake(self) -> list[Rest]:
        calls = [a.call("wake", what="its waking") for a in self.reached()]
        return [rest for _, rest in self._answers(calls, "sync", stop=False)]

    def hosts(self) -> list[Host]:
        return [host for _, host in self._answers([a.call("host", what="its host") for a in self.reached()], "sync")]

    def update_weights(
        self,
        sent: SentWeights,
        version: WeightVersion,
        in_flight: InFlight = "finish",
        *,
        only: Sequence[int] | None = None,
    ) -> list[TakenWeights]:
        """Hands the trainer's weights to samplers and checks that they arrived.

        Args:
            in_flight: what becomes of sequences under way (``RolloutEngine.update_weights``).
            only: these samplers; None: all that can be reached.

        Raises:
            SyncError: a sampler's checksum is not the sender's.
        """
        calls = self._updates(sent, version, in_flight, only)
        # Who lets sequences end first may take as long as the longest of them.
        finishing_s = self._deadlines.rollout if in_flight == "finish" else 0.0
        with self._staying(calls):
            return self._checked(sent, version, self._answers(calls, "sync", longer_s=finishing_s))

    def receive_broadcast(
        self, trainer: TrainerGroup, dtype: str, request: SendRequest, in_flight: InFlight = "finish"
    ) -> tuple[SentWeights, list[TakenWeights]]:
        """Has the samplers' GPUs receive what trainer rank 0 broadcasts. They meet at the first call.

        Raises:
            SyncError: a sampler's checksum is not the sender's.
            ActorLost: a sampler was lost, which a broadcast does not survive.
        """
        if self._broadcast_index is None:
            self._broadcast_index = trainer.weights_index(dtype)
            self._meet(trainer)
        announced = SentWeights("nccl", [], "", 0, index=tuple(self._broadcast_index))
        sending = trainer.broadcasting(dtype, self._broadcast_index)
        receiving = self._updates(announced, request.version, in_flight)
        with self._staying(receiving):  # a broadcast does not survive it
            answers = self._gather([*sending, *receiving], "sync")
        taken = list(zip(receiving, answers[len(sending) :], strict=True))
        return answers[0], self._checked(answers[0], request.version, taken)

    def read_buckets(
        self, trainer: TrainerGroup, dtype: str, request: SendRequest, in_flight: InFlight = "finish"
    ) -> tuple[SentWeights, list[TakenWeights]]:
        """Has the samplers read what trainer ranks pack on their GPUs, one bucket after the other.

        Raises:
            SyncError: a sampler's checksum is not the sender's.
        """
        updating = self._updates(SentWeights("cuda_ipc", [], "", 0), request.version, in_flight)
        asked = {call.index: call.life for call in updating}
        with self._staying(updating):
            while isinstance(packed := trainer.pack_weights(dtype), IpcBucket):
                self._offer(packed, asked)
            self._offer(None, asked)
            return packed, self._checked(packed, request.version, self._answers(updating, "sync"))

    def _offer(self, bucket: IpcBucket | None, asked: dict[int, int]) -> None:
        """asked: the lives that take part in the update; who was lost meanwhile takes no further part."""
        taking = [a for a in self.reached() if asked.get(a.spec.index) == a.life]
        self._answers([a.call("offer_weights", bucket, what="a bucket of weights") for a in taking], "sync")

    def _meet(self, trainer: TrainerGroup) -> None:
        host, port = trainer.meeting_place()
        ranks = self._ranks_per_sampler
        world = 1 + len(self) * ranks
        calls = [trainer.joining(Meeting(host, port, 0, world))]
        calls += [
            a.call("join_trainer", Meeting(host, port, 1 + i * ranks, world), what="meeting the trainer")
            for i, a in enumerate(self._actors)
        ]
        self._gather(calls, "sync")
        self._met = self.lives()

    def _updates(
        self, sent: SentWeights, version: WeightVersion, in_flight: InFlight, only: Sequence[int] | None = None
    ) -> list[Call]:
        what = f"weights of step {version.step}"
        asked = [a for a in self.reached() if only is None or a.spec.index in only]
        return [a.call("update_weights", sent, version, in_flight, what=what) for a in asked]

    def _checked(
        self, sent: SentWeights, version: WeightVersion, taken: list[tuple[Call, TakenWeights]]
    ) -> list[TakenWeights]:
        for call, answer in taken:
            check_sync(
                sender_before=self._sender_checksum,
                sender_after=sent.checksum,
                sampler_before=self._sampler_checksum,
                sampler_after=answer.checksum,
                sampler=call.actor,
            )
        self._sender_checksum = self._sampler_checksum = sent.checksum
        if self._watcher is not None:
            self._watcher.given([call for call, _ in taken], version)
        return [answer for _, answer in taken]


class RewardGroup(Group):
    role, worker, concurrency_groups = "reward", RewardWorker, {"control": 1}

    def starting(self, config: RunConfig) -> list[Call]:
        settings = ContextSettings(
            hints=config.hints if needs_teacher(config) else None,
            functional_tokens=config.algorithm.functional_tokens,
            chat_template=config.model.chat_template,
            system_prompt=config.data.system_prompt,
        )
        start = ("start", config.model.path, config.reward, settings)
        return self._starts(lambda a: a.call(*start, what="starting reward processes"))

    def score(
        self,
        shards: Sequence[ray.ObjectRef],
        *,
        record_rows: Sequence[int],
        step_rows: int,
        payload: Any,
        train: bool = True,
        index: int = 0,
    ) -> tuple[list[ray.ObjectRef], Call]:
        """The references of the shards' reward columns, and the call whose answer is their RewardSummaries.

        Args:
            record_rows: by shard.
            train: also write what the loss needs (see RewardWorker.score).
            index: who is asked.
        """
        actor = self.at(index)
        verb = actor.handle.score.options(num_returns=len(shards) + 1)
        *columns, summaries = verb.remote(list(record_rows), step_rows, train, *shards)
        return columns, actor.called(summaries, f"rewards of {len(shards)} shards", payload)


class ReferenceGroup(Group):
    role, worker, concurrency_groups = "reference", ReferenceWorker, {"control": 1}

    def starting(self, config: RunConfig) -> list[Call]:
        def start(a: Actor) -> Call:
            return a.call(
                "start",
                config.model,
                config.trainer,
                temperature=config.rollout.temperature,
                threads=a.spec.threads,
                longest=config.data.max_prompt_tokens + config.data.max_response_tokens,
                what="loading the reference",
            )

        return self._starts(start)

    def logprobs(self, shards: Sequence[ray.ObjectRef], index: int = 0) -> tuple[list[ray.ObjectRef], Call]:
        """The references of the shards' column ``ref_logprobs``, and the call that ends when they are there. index: who
        is asked."""
        actor = self.at(index)
        *columns, rows = actor.handle.logprobs.options(num_returns=len(shards) + 1).remote(*shards)
        return columns, actor.called(rows, f"reference log-probs of {len(shards)} shards")


class TrainerGroup(Group):
    """The verbs: forward, forward_backward, optim_step, save_state, load_state, export_weights."""

    role, worker = "trainer", TrainerWorker

    def _arguments(self, spec: ActorSpec, count: int) -> tuple[Any, ...]:
        return spec.index, count

    def starting(
        self,
        model: ModelConfig,
        trainer: TrainerConfig,
        *,
        temperature: float,
        total_steps: int,
        seed: int,
        distillation: DistillationConfig | None = None,
        longest: int | None = None,
    ) -> list[Call]:
        """Ranks meet and load.

        Args:
            temperature: of the sampler (1 for supervised training).
            total_steps: optimiser steps that the schedule spans.
            distillation: the teacher that the objective will ask for; None: none.
            longest: as ``load_engine`` takes it.
        """
        address = self._gather([self._actors[0].call("address", what="its address")], "start")[0]
        return [
            a.call(
                "start",
                address,
                model,
                trainer,
                temperature=temperature,
                total_steps=total_steps,
                seed=seed,
                threads=a.spec.threads,
                collective_timeout_s=self._deadlines.train,
                distillation=distillation,
                critic=self.role == "critic",
                longest=longest,
                what=f"loading the {self.role}",
            )
            for a in self._actors
        ]

    def require_shared(self, folder: Path) -> None:
        """Every rank writes its shard of a checkpoint into the run folder, so every node must see it.

        Raises:
            UserError: a rank does not.
        """
        seen = self._all("sees", str(folder / "config.yaml"), phase="start", what="a look at the run folder")
        blind = [actor.spec.name for actor, sees in zip(self._actors, seen, strict=True) if not sees]
        if blind:
            raise UserError(
                f"{', '.join(blind)} cannot see the run folder: on several nodes it must lie on a shared file system",
                where="run_root",
                fix=f"set run_root to a folder that every node has, instead of {folder.parent}",
            )

    def free_and_total(self) -> tuple[int, int]:
        """Bytes of the device of the rank that has least."""
        return min(self._all("free_and_total", phase="start", what="its memory"))

    def measure_peak(self) -> float:
        """FLOP/s of matrix products, all ranks at once."""
        return sum(self._all("measure_peak", phase="start", what="its fastest matrix product"))

    def set_objective(self, objective: Objective) -> None:
        self._all("set_objective", objective, phase="start", what="the objective")

    def load_batch(
        self,
        ranks: list[list[list[Slice]]],
        *,
        pairs: list[list[list[Slice]]] | None = None,
        group_gap: float | None = None,
        bypass: bool = False,
        reference: bool = False,
    ) -> None:
        """ranks[r][u]: the slices of rank r in optimiser step u; pairs likewise; see TrainerWorker.load_batch."""
        calls = [
            a.call(
                "load_batch",
                ranks[a.spec.index],
                pairs=None if pairs is None else pairs[a.spec.index],
                group_gap=group_gap,
                bypass=bypass,
                reference=reference,
                what="its rows",
            )
            for a in self._actors
        ]
        self._gather(calls, "train")

    def forward(self, *, reference_kl: KLEstimator | None) -> list[ForwardSummary]:
        """reference_kl: how the KL to the reference is estimated, where it is asked for."""
        return self._all("forward", reference_kl=reference_kl, phase="train", what="old log-probs")

    def token_advantages(
        self, requests: list[TokenAdvantagesRequest], values: list[ray.ObjectRef] | None
    ) -> tuple[list[ray.ObjectRef], list[AdvantageSummary]]:
        """requests[r], values[r]: of rank r.

        Returns:
            By rank: the reference of the ``returns`` of its updates' rows, and its advantages' summary.
        """
        refs = [
            a.handle.token_advantages.options(num_returns=2).remote(
                requests[a.spec.index], None if values is None else values[a.spec.index]
            )
            for a in self._actors
        ]
        calls = [Call(means, a.spec.name, "advantages") for a, (_, means) in zip(self._actors, refs, strict=True)]
        return [returns for returns, _ in refs], self._gather(calls, "train")

    def forward_backward(
        self,
        update: int,
        columns: list[dict[str, Any]],
        settings: StepSettings | None = None,
        *,
        channel_gradients: bool = False,
    ) -> dict[str, float]:
        """columns[r]: per-sample values of rank r's samples."""
        calls = [
            a.call(
                "forward_backward",
                update,
                columns[a.spec.index],
                settings,
                channel_gradients=channel_gradients,
                what=f"gradient of update {update}",
            )
            for a in self._actors
        ]
        return self._gather(calls, "train")[0]

    def pair_reference(self, pairs: DataProto) -> DataProto:
        """The pairs with the log-probs of the model without its adapter."""
        parts = np.array_split(np.arange(len(pairs)), len(self._actors))
        calls = [
            a.call("pair_reference", pairs.select_idxs(rows) if len(rows) else DataProto(), what="reference of pairs")
            for a, rows in zip(self._actors, parts, strict=True)
        ]
        return DataProto.concat([part for part in self._gather(calls, "train") if len(part)])

    def pair_margins(self, pairs: DataProto, loss: str, options: dict[str, Any]) -> np.ndarray:
        """[P] margins of preference pairs under the present policy."""
        parts = np.array_split(np.arange(len(pairs)), len(self._actors))
        calls = [
            a.call("pair_margins", pairs.select_idxs(rows) if len(rows) else DataProto(), loss, options, what="margins")
            for a, rows in zip(self._actors, parts, strict=True)
        ]
        return np.concatenate(self._gather(calls, "train"))

    def save_batch(self, update: int, folder: Path) -> None:
        """Every rank's rows of an update, for inspection: ``{role}-{rank}.safetensors``."""
        calls = [
            a.call("save_batch", update, str(folder / f"{self.role}-{a.spec.index}.safetensors"), what="its rows")
            for a in self._actors
        ]
        self._gather(calls, "checkpoint", stop=False)

    def optim_step(self) -> dict[str, float]:
        return self._all("optim_step", phase="train", what="optimiser step")[0]

    def export_weights(self, dtype: str, request: SendRequest | None = None) -> SentWeights:
        """request: the transport; None: the object store."""
        return self._all("export_weights", dtype, request, phase="sync", what="gathered weights")[0]

    def release_weights(self) -> None:
        self._all("release_weights", phase="sync", what="freeing memory of the last update")

    def offload(self, *, weights: bool) -> list[Rest]:
        return self._all("offload", weights=weights, phase="sync", what="its way to main memory", stop=False)

    def onload(self, *, optimizer: bool) -> list[Rest]:
        return self._all("onload", optimizer=optimizer, phase="sync", what="its way back to the GPU", stop=False)

    def pack_weights(self, dtype: str) -> IpcBucket | SentWeights:
        """A bucket with every rank's handle, or, when there are no more, what was sent."""
        first, *others = self._all("pack_weights", dtype, phase="sync", what="a bucket of weights")
        return first.merged(others) if isinstance(first, IpcBucket) else first

    def hosts(self) -> list[Host]:
        return self._all("host", phase="sync", what="its host")

    def weights_index(self, dtype: str) -> list[Entry]:
        return self._all("weights_index", dtype, phase="sync", what="names of weights")[0]

    def meeting_place(self) -> tuple[str, int]:
        return self._first("address", "its address")

    def joining(self, meeting: Meeting) -> Call:
        return self._actors[0].call("join_samplers", meeting, what="meeting the samplers")

    def broadcasting(self, dtype: str, index: list[Entry]) -> list[Call]:
        return [a.call("broadcast_weights", dtype, index, what="broadcast weights") for a in self._actors]

    def _first(self, method: str, what: str) -> Any:
        """The answer of rank 0 alone: nothing collective."""
        return self._gather([self._actors[0].call(method, what=what)], "sync")[0]

    def save_state(self, folder: str) -> None:
        self._all("save_state", folder, phase="checkpoint", what="its shard of the checkpoint", stop=False)

    def load_state(self, folder: str) -> None:
        self._all("load_state", folder, phase="checkpoint", what="reading the checkpoint")

    def export_hf(self, folder: str, source: str, dtype: str) -> None:
        self._all("export_hf", folder, source, dtype, phase="checkpoint", what="a Hugging Face folder", stop=False)

    def save_adapter(self, folder: str, base: str, dtype: str) -> None:
        self._all("save_adapter", folder, base, dtype, phase="checkpoint", what="the adapter", stop=False)

    def _all(self, method: str, *args: Any, phase: str, what: str, stop: bool = True, **kwargs: Any) -> list[Any]:
        return self._gather([a.call(method, *args, what=what, **kwargs) for a in self._actors], phase, stop=stop)


class CriticGroup(TrainerGroup):
    """As many ranks as the trainer, each with the same rows: its verbs, on a value model."""

    role = "critic"

    def values(self) -> list[ray.ObjectRef]:
        """By rank, the reference of the values of its updates' rows."""
        refs = [a.handle.values.remote() for a in self._actors]
        waiting = [Call(ref, a.spec.name, "values") for a, ref in zip(self._actors, refs, strict=True)]
        self._gather(waiting, "train")
        return refs

    def join(self, columns: list[ray.ObjectRef]) -> None:
        """columns[r]: reference of further columns of rank r's updates."""
        calls = [a.call("join", columns[a.spec.index], what="its returns") for a in self._actors]
        self._gather(calls, "train")


__all__ = [
    "CriticGroup",
    "ReferenceGroup",
    "RewardGroup",
    "RewardSummary",
    "RolloutGroup",
    "RolloutSummary",
    "TrainerGroup",
]
