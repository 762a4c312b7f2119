"""TrainerWorker: the actor around one rank of a train engine. Its verbs are the engine's; the batch of the current step
stays with the rank between them."""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch

from rlsys.algorithms.advantages import estimate_tokens
from rlsys.algorithms.collapse import spread
from rlsys.algorithms.kl import KLEstimator, kl_estimate
from rlsys.algorithms.mismatch import Mismatch, mismatch_sums
from rlsys.algorithms.objective import Objective, StepSettings
from rlsys.algorithms.preferences import PREFERENCE_LOSSES, PairLogprobs, pair_sums
from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.batch.versions import WeightVersion
from rlsys.checkpoint.export import export_hf
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.flops import ModelFlops, matmul_peak
from rlsys.engines.footprint import free_and_total
from rlsys.engines.rollout.base import Rest
from rlsys.engines.storages import used_bytes
from rlsys.engines.sync.broadcast import Broadcaster, Meeting
from rlsys.engines.sync.buckets import Entry
from rlsys.engines.sync.checksum import tensor_digest
from rlsys.engines.sync.cuda_ipc import IpcBucket, IpcSender, gpu_uuid
from rlsys.engines.train import TrainEngine, init_process_group, load_engine
from rlsys.engines.train.collectives import Ranks, training_device
from rlsys.engines.train.lora import save_adapter
from rlsys.replay.pairs import join_pairs, pairs_from_groups, reference_view, with_reference
from rlsys.tracking.meter import Metered
from rlsys.workers.weights import Host, SendRequest, SentWeights, WeightSender

_READS = ("prompt_ids", "response_ids", "response_mask", "rollout_logprobs")


@dataclass(frozen=True)
class Slice:
    """Rows of one shard, on their way to one rank.

    columns: references of DataProtos with the same rows, each with some of the columns; rows [b]: which of them.
    """

    columns: tuple[ray.ObjectRef, ...]
    rows: np.ndarray


@dataclass(frozen=True)
class ForwardSummary:
    """kl_sums: per update, [rows] Σ over tokens of the KL of π_old to the reference, None where it was not asked for;
    mismatch: per update, sampler against trainer over this rank's tokens."""

    kl_sums: list[np.ndarray] | None
    mismatch: list[Mismatch]


@dataclass(frozen=True)
class TokenAdvantagesRequest:
    """How advantages are made of rewards in the ranks.

    name, options: the estimator. rewards: per update, [rows] of this rank's samples.
    kl_coef, kl_estimator: of a penalty on every token's reward; None: there is none.
    """

    name: str
    options: dict[str, Any]
    rewards: list[np.ndarray]
    kl_coef: float = 0.0
    kl_estimator: KLEstimator | None = None


@dataclass(frozen=True)
class AdvantageSummary:
    """means: by update, the mean advantage of each of its rows; metrics: over all ranks, the same on each."""

    means: list[np.ndarray]
    metrics: dict[str, float]


_VERBS = (
    "load_batch",
    "forward",
    "values",
    "token_advantages",
    "forward_backward",
    "optim_step",
    "export_weights",
    "pair_margins",
    "pair_reference",
    "save_state",
    "load_state",
    "offload",
    "onload",
)


class TrainerWorker(Metered, verbs=_VERBS):
    """One trainer rank. Every rank of a group is called with the same verb at the same time."""

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size
        self._updates: list[DataProto] = []
        self._bypass = False
        self._sender = WeightSender()
        self._frozen: dict[str, bytes] | None = None
        self._packing: IpcSender | None = None
        self._away: Literal["nothing", "optimizer", "everything"] = "nothing"

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met: this node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(
        self,
        address: tuple[str, int],
        model: ModelConfig,
        trainer: TrainerConfig,
        *,
        temperature: float,
        total_steps: int,
        seed: int,
        threads: int,
        collective_timeout_s: float,
        distillation: DistillationConfig | None = None,
        critic: bool = False,
        longest: int | None = None,
    ) -> tuple[int, int]:
        """Meets the other ranks and loads the model.

        Args:
            total_steps: optimiser steps that the schedule spans.
            distillation: the teacher that the objective will ask for; None: none.
            critic: a value model instead of a policy.
            longest: as ``load_engine`` takes it.

        Returns:
            Parameters of the model, and those of them that are trained.
        """
        torch.set_num_threads(threads)
        init_process_group(self._rank, self._world_size, *address, timeout_s=collective_timeout_s)
        self._engine = load_engine(
            model,
            trainer,
            temperature=temperature,
            total_steps=total_steps,
            seed=seed,
            distillation=distillation,
            critic=critic,
            longest=longest,
        )
        from transformers import AutoConfig  # takes seconds, and the driver reads this module

        self._dtype: torch.dtype = getattr(torch, model.dtype)
        config = AutoConfig.from_pretrained(model.path)
        counts = self._engine.parameter_count, self._engine.trained_count
        self._flops = ModelFlops.of(config, *counts, value_head=critic)
        self._model, self._critic = model, critic
        return counts

    def free_and_total(self) -> tuple[int, int]:
        """Bytes of this rank's GPU, or of its host's memory."""
        return free_and_total(training_device())

    @property
    def _engine(self) -> TrainEngine:
        if self._away == "everything":
            raise RuntimeError("the trainer is asked for something while it waits in main memory")
        return self._loaded

    @_engine.setter
    def _engine(self, engine: TrainEngine) -> None:
        self._loaded = engine

    def offload(self, *, weights: bool) -> Rest:
        """Moves optimiser and gradient to main memory, and with ``weights`` these too. Does nothing more where that has
        been done, or where there is no other memory."""
        before = used_bytes(training_device())
        due = self._loaded.offload(weights=weights)
        if weights or self._away == "nothing":
            self._away = "everything" if weights else "optimizer"
        return Rest(before, used_bytes(training_device()), due)

    def onload(self, *, optimizer: bool) -> Rest:
        """Moves back what is away; without ``optimizer`` the weights alone."""
        before = used_bytes(training_device())
        self._loaded.onload(optimizer=optimizer)
        self._away = "nothing" if optimizer or self._away == "nothing" else "optimizer"
        return Rest(before, used_bytes(training_device()))

    def measure_peak(self) -> float:
        """FLOP/s of a matrix product in the dtype of the forward pass, while the other ranks do the same."""
        return matmul_peak(self._dtype, training_device())

    def sees(self, path: str) -> bool:
        """Whether this rank's node has the file."""
        return Path(path).is_file()

    def set_objective(self, objective: Objective) -> None:
        self._objective = objective

    def load_batch(
        self,
        updates: list[list[Slice]],
        *,
        pairs: list[list[Slice]] | None = None,
        group_gap: float | None = None,
        bypass: bool = False,
        reference: bool = False,
    ) -> None:
        """Fetches this rank's rows of the step, one list of slices an optimiser step.

        Args:
            pairs: rows of preference pairs from a file, likewise; they are appended to the samples.
            group_gap: make pairs of the best and the worst response of every group that differ by this reward.
            bypass: π_old := μ.
            reference: write ``ref_logprobs`` of the samples: those of the model without its adapter.
        """
        refs = {ref for slices in (*updates, *(pairs or [])) for s in slices for ref in s.columns}
        shards = dict(zip(refs, ray.get(list(refs)), strict=True))
        self._updates = [_assemble(slices, shards) for slices in updates]
        self._bypass = bypass
        if bypass:
            for batch in filter(len, self._updates):
                batch.batch["old_logprobs"] = batch.batch["rollout_logprobs"]
        for batch in self._updates if reference else ():
            found = self._engine.forward(batch, adapter=False)  # a collective, also without rows
            if len(batch):
                batch.batch["ref_logprobs"] = found.batch["logprobs"]
        if group_gap is not None:
            self._updates = [
                pairs_from_groups(batch, batch.batch["rewards"].numpy(), min_gap=group_gap) if len(batch) else batch
                for batch in self._updates
            ]
        if pairs is not None:
            joined = [_assemble(slices, shards) for slices in pairs]
            self._updates = [join_pairs(batch, more) for batch, more in zip(self._updates, joined, strict=True)]

    def forward(self, *, reference_kl: KLEstimator | None) -> ForwardSummary:
        """Writes ``old_logprobs`` of the whole step, before its first optimiser step.

        Args:
            reference_kl: also estimate the KL to the reference, this way; reads ``ref_logprobs``.
        """
        mismatch: list[Mismatch] = []
        kl_sums: list[np.ndarray] = []
        for batch in self._updates:
            check_columns(batch, (*_READS, *(("ref_logprobs",) if reference_kl else ())), "old log-probs")
            output = self._engine.forward(batch)  # a collective: called even where this rank has no rows
            if not len(batch):
                kl_sums.append(np.empty(0))
                continue
            logprobs = output.batch["logprobs"]
            if not self._bypass:
                batch.batch["old_logprobs"] = logprobs
            batch.batch["old_entropy"] = output.batch["entropy"]
            mask = jagged.values(batch.batch["response_mask"])
            old, sampler = jagged.values(logprobs), jagged.values(batch.batch["rollout_logprobs"])
            mismatch.append(mismatch_sums(old, sampler, mask))
            if reference_kl:
                reference = jagged.values(batch.batch["ref_logprobs"])
                per_token = jagged.from_values(
                    kl_estimate(old, reference, reference_kl) * mask, jagged.lengths(logprobs)
                )
                kl_sums.append(jagged.segment_sum(per_token).numpy())
        return ForwardSummary(kl_sums if reference_kl else None, mismatch)

    def values(self) -> list[DataProto]:
        """A critic's ``values`` of every update's rows, before its first optimiser step."""
        columns = [self._engine.forward(batch) for batch in self._updates]  # a collective, also without rows
        for batch, column in zip(self._updates, columns, strict=True):
            if len(batch):
                batch.union(column)
        return columns

    def join(self, columns: list[DataProto]) -> None:
        """Adds columns to every update's rows."""
        for batch, column in zip(self._updates, columns, strict=True):
            if len(batch):
                batch.union(column)

    def token_advantages(
        self, request: TokenAdvantagesRequest, values: list[DataProto] | None
    ) -> tuple[list[DataProto], AdvantageSummary]:
        """Writes ``advantages`` by an estimator that needs tokens, whitened over all ranks' rows of the step.

        Args:
            values: a critic's, of the same rows.

        Returns:
            ``returns`` of every update's samples, and what the driver sees of the advantages.
        """
        flat = [_flat(batch, rewards, request) for batch, rewards in zip(self._updates, request.rewards, strict=True)]
        starts = np.cumsum([0, *(len(batch) for batch in self._updates)])
        mask, penalty = (torch.cat([part[i] for part in flat]) for i in (1, 3))
        rows = torch.cat([part[2] + int(start) for part, start in zip(flat, starts[:-1], strict=True)])
        inputs: dict[str, torch.Tensor] = {}
        if values is not None:
            inputs["values"] = torch.cat(
                [jagged.values(v.batch["values"]) if len(v) else torch.zeros(0) for v in values]
            )
        made = estimate_tokens(
            request.name,
            torch.cat([part[0] for part in flat]),
            mask,
            rows,
            int(starts[-1]),
            Ranks(),
            token_penalty=penalty if request.kl_estimator is not None else None,
            inputs=inputs,
            **request.options,
        )
        returns: list[DataProto] = []
        means: list[np.ndarray] = []
        start = 0
        for batch, part, rewards in zip(self._updates, flat, request.rewards, strict=True):
            stop = start + len(part[1])
            if not len(batch):
                returns.append(DataProto())
                means.append(np.empty(0))
                continue
            lengths = jagged.lengths(batch.batch["response_mask"])
            column = jagged.from_values(made.advantages[start:stop], lengths)
            batch.batch["advantages"] = column
            # The critic has no pairs: they follow the samples, and have no response.
            kept = jagged.from_values(made.returns[start:stop], lengths[: len(rewards)])
            returns.append(DataProto.from_dict(tensors={"returns": kept}) if len(rewards) else DataProto())
            sampled = jagged.segment_sum(batch.batch["response_mask"]).clamp(min=1)
            means.append((jagged.segment_sum(column) / sampled).numpy())
            start = stop
        metrics = {"advantage/std": _masked_std(made.advantages, mask)}
        if "values" in inputs:
            metrics |= _critic_metrics(inputs["values"][mask], made.returns[mask])
        return returns, AdvantageSummary(means, metrics)

    def pair_reference(self, pairs: DataProto) -> DataProto:
        """These pairs with ``chosen_ref_logprobs`` and ``rejected_ref_logprobs`` of the model without its adapter. A
        collective: every rank is called, also with none."""
        for side in ("chosen", "rejected"):
            rows = reference_view(pairs, side) if len(pairs) else pairs
            output = self._engine.forward(rows, adapter=False)
            if len(pairs):
                pairs = with_reference(pairs, side, output.rename("logprobs", "ref_logprobs") if len(rows) else rows)
        return pairs

    def pair_margins(self, pairs: DataProto, loss: str, options: dict[str, Any]) -> np.ndarray:
        """[P] margins of these pairs under the policy. A collective: every rank is called, also with none."""
        sides: dict[str, PairLogprobs] = {}
        for side in ("chosen", "rejected"):
            output = self._engine.forward(reference_view(pairs, side) if len(pairs) else pairs)
            if not len(pairs):
                continue
            mask = jagged.values(pairs.batch[f"{side}_mask"])
            rows = torch.repeat_interleave(torch.arange(len(pairs)), jagged.lengths(pairs.batch[f"{side}_ids"]))
            scored = with_reference(pairs, side, output.rename("logprobs", "ref_logprobs"))
            policy, lengths = pair_sums(jagged.values(scored.batch[f"{side}_ref_logprobs"]), mask, rows, len(pairs))
            reference = None
            if f"{side}_ref_logprobs" in pairs.batch.keys():  # noqa: SIM118 (a TensorDict iterates over rows)
                known = jagged.values(pairs.batch[f"{side}_ref_logprobs"])
                reference = pair_sums(known, mask, rows, len(pairs))[0]
            sides[side] = PairLogprobs(policy, reference, lengths)
        if not len(pairs):
            return np.empty(0)
        function = PREFERENCE_LOSSES.get(loss, where="algorithm.preference.loss")
        return function(sides["chosen"], sides["rejected"], **options).margin.numpy()

    def forward_backward(
        self,
        update: int,
        columns: dict[str, np.ndarray],
        settings: StepSettings | None = None,
        *,
        channel_gradients: bool = False,
    ) -> dict[str, float]:
        """Accumulates the objective's gradient over one update's rows of all ranks.

        Args:
            columns: per-sample values [samples] to join first, each spread over its sample's sampled tokens
                (``advantages``).
            settings: what is different in this step.
            channel_gradients: also measure the norm of each channel's gradient.
        """
        batch = self._updates[update]
        objective = self._objective if settings is None else self._objective.at(settings)
        if len(batch):
            for name, values in columns.items():
                mask = batch.batch["response_mask"]
                lengths = jagged.lengths(mask)
                per_row = torch.zeros(len(batch))
                per_row[: len(values)] = torch.from_numpy(values.astype(np.float32))  # pairs follow the samples
                spread = per_row.repeat_interleave(lengths) * jagged.values(mask)
                batch.batch[name] = jagged.from_values(spread, lengths)
            check_columns(batch, (*_sequence_columns(objective), *objective.reads), "objective")
        found = self._engine.forward_backward(batch, objective, channel_gradients=channel_gradients)
        work = self._engine.work
        self.meter.count("flops", self._flops.training(work.lengths, work.scored, work.contexts))
        return _named(found)

    def optim_step(self) -> dict[str, float]:
        return _named(self._engine.optim_step())

    def save_batch(self, update: int, path: str) -> None:
        """Writes this rank's rows of an update, for inspection: one safetensors file."""
        if len(self._updates[update]):
            self._updates[update].save(path)

    def host(self) -> Host:
        device = training_device()
        return Host.here([gpu_uuid(device)] if device.type == "cuda" else [])

    def export_weights(self, dtype: str, request: SendRequest | None = None) -> SentWeights | None:
        """Rank 0: hands out the weights in ``dtype``. Others: None; the gathers are collective.

        Args:
            request: the transport; None: the object store.
        """
        request = request or SendRequest("object_store", WeightVersion(0, 0))
        held: dict[str, bytes] = {}
        if request.adapter:
            held = self._base_digests(getattr(torch, dtype))
            weights = self._engine.export_adapter(getattr(torch, dtype))
        else:
            weights = self._engine.export_weights(getattr(torch, dtype))
        if self._rank:
            for _ in weights:
                pass
            return None
        return self._sender.send(weights, request, held)

    def _base_digests(self, dtype: torch.dtype) -> dict[str, bytes]:
        """Of every weight that the adapter leaves frozen, computed once; on rank 0."""
        if self._frozen is None:
            weights = self._engine.export_weights(dtype, adapter=False)
            self._frozen = {name: b"" if self._rank else tensor_digest(weight) for name, weight in weights}
        return self._frozen

    def release_weights(self) -> None:
        """Every sampler has taken what was exported."""
        self._sender.release()
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()  # what receivers have let go of

    def pack_weights(self, dtype: str) -> IpcBucket | SentWeights:
        """The next bucket of this rank's GPU, over the one before, which every sampler has read. A collective: every
        rank has the same weights in it. When there are no more: what was sent; the next call begins anew."""
        if self._packing is None:
            self._began = time.perf_counter()
            weights = self._engine.export_weights(getattr(torch, dtype), on_device=True)
            device = training_device()
            gpu_uuid(device)  # or it says that there is none
            self._packing = IpcSender(weights, allocate=lambda n: torch.empty(n, dtype=torch.uint8, device=device))
        bucket = self._packing.next()
        if bucket is not None:
            return bucket
        done, self._packing = self._packing, None
        seconds = {"pack": time.perf_counter() - self._began}
        return SentWeights("cuda_ipc", [], done.checksum.hexdigest(), done.nbytes, seconds)

    def weights_index(self, dtype: str) -> list[Entry] | None:
        """Rank 0: name, dtype and shape of every weight, in the order of ``export_weights``. Others: None."""
        weights = self._engine.export_weights(getattr(torch, dtype), on_device=True)
        index = [Entry.of(name, tensor, 0) for name, tensor in weights]
        return None if self._rank else index

    def join_samplers(self, meeting: Meeting) -> None:
        """Rank 0 meets the samplers for broadcasts of weights between GPUs."""
        self._broadcaster = Broadcaster(meeting)

    def broadcast_weights(self, dtype: str, index: list[Entry]) -> SentWeights | None:
        """Rank 0 broadcasts the weights that ``index`` lists; every sampler receives meanwhile. Others: None."""
        weights = self._engine.export_weights(getattr(torch, dtype), on_device=True)
        if self._rank:
            for _ in weights:
                pass
            return None
        checksum, nbytes, seconds = self._broadcaster.send(weights, index)
        return SentWeights("nccl", [], checksum, nbytes, seconds)

    def save_state(self, folder: str) -> None:
        """The engine's state; a policy's adapter besides in peft's format, which other programs load (``adapter/``)."""
        self._engine.save_state(Path(folder))
        if self._model.lora is not None and not self._critic:
            self.save_adapter(str(Path(folder) / "adapter"), self._model.path, "float32")

    def load_state(self, folder: str) -> None:
        self._engine.load_state(Path(folder))

    def export_hf(self, folder: str, source: str, dtype: str) -> None:
        """Writes the weights as a Hugging Face folder (rank 0 writes, all gather)."""
        weights = self._engine.export_weights(getattr(torch, dtype))
        if self._rank:
            for _ in weights:
                pass
            return
        export_hf(Path(folder), Path(source), weights, dtype=getattr(torch, dtype))

    def save_adapter(self, folder: str, base: str, dtype: str) -> None:
        """Writes the adapter in peft's format (rank 0 writes, all gather). base: the model that it belongs to."""
        weights = list(self._engine.export_adapter(getattr(torch, dtype)))
        if not self._rank and self._model.lora is not None:
            save_adapter(Path(folder), weights, self._model.lora, base, getattr(torch, dtype))

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def _sequence_columns(objective: Objective) -> tuple[str, ...]:
    """Columns that the engine itself reads for the objective's sequences."""
    response = ("prompt_ids", "response_ids") if "response" in objective.sequences else ()
    return (*response, *(("teacher_prompt_ids",) if objective.divergence is not None else ()))


def _flat(
    batch: DataProto, rewards: np.ndarray, request: TokenAdvantagesRequest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards [B], mask [N], rows [N] and KL penalty [N] of an update's samples."""
    none = torch.zeros(0)
    if not len(batch):
        return none, none.bool(), none.long(), none
    column = batch.batch["response_mask"]
    mask, lengths = jagged.values(column), jagged.lengths(column)
    rows = torch.repeat_interleave(torch.arange(len(batch)), lengths)
    penalty = torch.zeros(len(mask))
    if request.kl_estimator is not None:
        old, reference = (jagged.values(batch.batch[name]) for name in ("old_logprobs", "ref_logprobs"))
        penalty = request.kl_coef * kl_estimate(old, reference, request.kl_estimator) * mask
    per_row = torch.zeros(len(batch))
    per_row[: len(rewards)] = torch.from_numpy(rewards.astype(np.float32))  # pairs follow the samples
    return per_row, mask, rows, penalty


def _masked_std(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Over all ranks."""
    picked = values[mask].double()
    count, total, squares = Ranks().sum([len(picked), float(picked.sum()), float(picked.square().sum())])
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0)) if count else 0.0


def _critic_metrics(values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """How far predictions and targets are spread, over all ranks."""
    metrics: dict[str, float] = {}
    for name, here in (("prediction", values), ("target", returns)):
        found = spread(Ranks().gather(here.float()))
        metrics |= {f"critic/{name}_variance": found.variance, f"critic/{name}_distance": found.pairwise_distance}
    return metrics


def _assemble(slices: list[Slice], shards: dict[ray.ObjectRef, Any]) -> DataProto:
    parts = []
    for piece in slices:
        rows = shards[piece.columns[0]].select_idxs(piece.rows)  # a copy: what came from the store is shared
        for ref in piece.columns[1:]:
            rows = rows.union(shards[ref].select_idxs(piece.rows))
        parts.append(rows)
    if not parts:  # a rank without rows still takes part in every collective
        return DataProto()
    return DataProto.concat(parts) if len(parts) > 1 else parts[0]


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """The engine's own metrics under ``train/``; a channel's are under the channel's name already."""
    return {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}
