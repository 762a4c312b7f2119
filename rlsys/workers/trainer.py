"""TrainerWorker: the actor around one rank of a train engine. Its verbs are the engine's; the batch of the current step
stays with the rank between them."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from rlsys.algorithms.kl import KLEstimator, kl_estimate
from rlsys.algorithms.mismatch import Mismatch, mismatch_sums
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.checkpoint.export import export_hf
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.sync.buckets import pack
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.train import TrainEngine, init_process_group, load_engine

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


class TrainerWorker:
    """One trainer rank. Every rank of a group is called with the same verb at the same time."""

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size
        self._updates: list[DataProto] = []
        self._bypass = False

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
    ) -> int:
        """Meets the other ranks and loads the model. total_steps: optimiser steps that the schedule spans.

        Returns:
            Parameters of the model.
        """
        torch.set_num_threads(threads)
        init_process_group(self._rank, self._world_size, *address, timeout_s=collective_timeout_s)
        self._engine: TrainEngine = load_engine(
            model, trainer, temperature=temperature, total_steps=total_steps, seed=seed
        )
        return self._engine.parameter_count

    def sees(self, path: str) -> bool:
        """Whether this rank's node has the file."""
        return Path(path).is_file()

    def set_objective(self, objective: Objective) -> None:
        self._objective = objective

    def load_batch(self, updates: list[list[Slice]], *, bypass: bool = False) -> None:
        """Fetches this rank's rows of the step, one list of slices an optimiser step. bypass: π_old := μ."""
        refs = {ref for slices in updates for s in slices for ref in s.columns}
        shards = dict(zip(refs, ray.get(list(refs)), strict=True))
        self._updates = [_assemble(slices, shards) for slices in updates]
        self._bypass = bypass
        if bypass:
            for batch in filter(len, self._updates):
                batch.batch["old_logprobs"] = batch.batch["rollout_logprobs"]

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

    def forward_backward(self, update: int, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """Accumulates the objective's gradient over one update's rows of all ranks.

        Args:
            columns: per-sample values [rows] to join first, each spread over its sample's sampled tokens
            (``advantages``).
        """
        batch = self._updates[update]
        if not len(batch):
            return _named(self._engine.forward_backward(batch, self._objective))
        mask = batch.batch["response_mask"]
        lengths = jagged.lengths(mask)
        for name, values in columns.items():
            spread = torch.from_numpy(values.astype(np.float32)).repeat_interleave(lengths) * jagged.values(mask)
            batch.batch[name] = jagged.from_values(spread, lengths)
        check_columns(batch, ("prompt_ids", "response_ids", *self._objective.reads), "objective")
        return _named(self._engine.forward_backward(batch, self._objective))

    def optim_step(self) -> dict[str, float]:
        return _named(self._engine.optim_step())

    def export_weights(self, dtype: str, *, share: bool = True) -> tuple[list[ray.ObjectRef], str] | None:
        """Rank 0: references of the weights' buckets in the object store, and the sender's checksum. Others: None."""
        weights = self._engine.export_weights(getattr(torch, dtype))
        if self._rank:
            for _ in weights:  # the gathers are collective
                pass
            return None
        buckets = list(pack(weights))
        checksum = weights_checksum(item for bucket in buckets for item in bucket.tensors())
        return [ray.put(bucket) for bucket in buckets] if share else [], checksum

    def save_state(self, folder: str) -> None:
        self._engine.save_state(Path(folder))

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

    def close(self) -> None:
        torch.distributed.destroy_process_group()


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
