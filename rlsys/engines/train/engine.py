"""The verbs of a trainer rank, whichever back end holds its weights: forward, forward_backward, optim_step, state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from rlsys.algorithms.objective import ForwardOutput, Objective, Prepared, TeacherOutput
from rlsys.algorithms.schedules import multiplier
from rlsys.batch import DataProto, jagged
from rlsys.batch.balance import packed_batches
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.flops import Work
from rlsys.engines.train import state
from rlsys.engines.train.attention import packs
from rlsys.engines.train.base import ShardedModel, TrainedModel
from rlsys.engines.train.collectives import Meter, Ranks, Slots, reduce_floats, training_device
from rlsys.engines.train.layers import prepare_layers
from rlsys.engines.train.lora import Adapter, adapter_off, adapter_weights, add_adapter, merged_weights
from rlsys.engines.train.model import PolicyModel, ValueModel, context_length, load_causal_lm, load_config
from rlsys.engines.train.resting import resting
from rlsys.engines.train.rows import MicroBatch, RankRows
from rlsys.engines.train.teacher import Teacher
from rlsys.engines.train.ulysses import SequenceRanks, check_packs, check_sequence_ranks

TEACHER = "teacher"  # name of a teacher's shards in a checkpoint


class ShardedEngine(ABC):
    """One rank. Weights and optimiser are float32; the forward pass runs in ``model.dtype``, in which weights that an
    adapter leaves frozen are held too.

    Gradients are reduced after every micro-batch: keeping them whole until the last one would save communication and
    cost each rank a full-sized gradient, which is what sharding is there to avoid.
    """

    def __init__(
        self,
        trained: TrainedModel,
        trainer: TrainerConfig,
        *,
        max_length: int,
        total_steps: int,
        seed: int,
        teacher: Teacher | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self._trained, self._trainer, self._teacher, self._adapter = trained, trainer, teacher, adapter
        self._model = trained.model
        self._max_length, self._total_steps, self._seed = max_length, total_steps, seed
        self._device = training_device()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self.parameter_count, self.trained_count = trained.parameter_count, trained.trained_count
        self._sequence = SequenceRanks(trainer.sequence_ranks) if trainer.sequence_ranks > 1 else None
        self._progress, self._finite = state.Progress(), True
        self.work = Work.joined([])
        self._resting = resting(self._device)
        state.seed_generators(seed, self._rank, 0)

    @staticmethod
    @abstractmethod
    def train(model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> TrainedModel:
        """Spreads a model over the ranks, with a gradient and an optimiser. dtype: of the forward pass.

        Raises:
            UserError: the back end cannot do what ``trainer`` asks for.
        """

    @staticmethod
    @abstractmethod
    def freeze(model: PolicyModel, trainer: TrainerConfig, dtype: torch.dtype, *, moves: bool) -> ShardedModel:
        """Spreads a teacher over the ranks, for forward passes only. moves: its weights will be written to."""

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        trainer: TrainerConfig,
        *,
        temperature: float,
        total_steps: int,
        seed: int,
        distillation: DistillationConfig | None = None,
        critic: bool = False,
        longest: int | None = None,
    ) -> Self:
        """Reads the model and shards it over the initialised process group.

        Args:
            temperature: of the sampler; logits are divided by it.
            total_steps: optimiser steps that the learning-rate schedule spans.
            seed: of the run.
            distillation: the teacher that a channel of the objective asks for; None: none does.
            critic: a value model instead of a policy.
            longest: prompt and response of the run, see ``freeze_rotation``; None: what the model allows.

        Raises:
            UserError: the model cannot be used (see ``rlsys.engines.train.model``), or not in this way.
        """
        dtype = getattr(torch, model.dtype)
        held = torch.float32 if model.lora is None else dtype
        check_sequence_ranks(load_config(model), trainer)
        packing, mapped = trainer.rows != "padded", model.lora is None  # an adapter's own weights are made here
        lm = load_causal_lm(model, held, packing=packing, longest=longest, mapped=mapped)
        check_packs(lm, trainer)
        max_length = context_length(lm)
        adapter = None if model.lora is None else add_adapter(lm, model.lora, seed=seed)
        prepare_layers(lm, trainer, training_device())
        if critic:
            values = cls.train(ValueModel(lm), trainer, dtype)
            return cls(values, trainer, max_length=max_length, total_steps=total_steps, seed=seed, adapter=adapter)
        policy = PolicyModel(lm, temperature=temperature)
        trained, teacher = cls.train(policy, trainer, dtype), None

        def shard(other: PolicyModel, moves: bool) -> ShardedModel:
            check_packs(other.lm, trainer)
            return cls.freeze(other, trainer, dtype, moves=moves)

        if distillation is not None:
            teacher = Teacher.load(distillation, model, policy, shard, temperature=temperature, longest=longest)
        return cls(
            trained,
            trainer,
            max_length=max_length,
            total_steps=total_steps,
            seed=seed,
            teacher=teacher,
            adapter=adapter,
        )

    def forward(self, batch: DataProto, *, adapter: bool = True) -> DataProto:
        """See TrainEngine."""
        if adapter:
            return self._forward(batch)
        with adapter_off(self._model):
            return self._forward(batch)

    @torch.no_grad()
    def _forward(self, batch: DataProto) -> DataProto:
        rows = self._rows(batch)
        columns: dict[str, torch.Tensor] = {}
        for micro in self._cut(rows, self._busiest(rows)):
            output = self._run(micro)
            found = {"logprobs": output.logprobs, "entropy": output.entropy}
            for name, values in (found if output.values is None else {"values": output.values}).items():
                columns.setdefault(name, torch.zeros(rows.num_tokens, device=self._device))[micro.token_index] = values
        # Without a backward pass the root's weights would stay gathered, and go stale with the next optimiser step.
        self._trained.release()
        lengths = rows.response_lengths
        return DataProto.from_dict(
            tensors={name: jagged.from_values(values.cpu(), lengths) for name, values in columns.items()}
        )

    def forward_backward(
        self, batch: DataProto, objective: Objective, *, channel_gradients: bool = False
    ) -> dict[str, float]:
        """See TrainEngine."""
        rows = self._rows(batch, objective)
        prepared = objective.prepare(rows.whole(), Ranks())
        count = max(self._busiest(rows), 1)  # without a row anywhere there are still metrics, and a gradient of 0
        if channel_gradients:
            metrics = self._channel_by_channel(rows, objective, prepared, count)
        else:
            metrics = self._accumulate(rows, objective, prepared, count)
        self._finite = self._finite and math.isfinite(metrics["loss"])
        (tokens,) = reduce_floats([rows.total], dist.ReduceOp.SUM)
        return metrics | {"tokens": tokens, "micro_batches": float(count)}

    def _accumulate(
        self, rows: RankRows, objective: Objective, prepared: dict[str, Prepared], count: int
    ) -> dict[str, float]:
        """One pass over the rows; the gradient is added up in the parameters."""
        meter, slots, works = Meter(), Slots(), []
        for micro in self._cut(rows, count):
            output = self._run(micro, objective)
            result = objective.loss(micro.response, output, prepared, micro.token_index)
            # The sum over an empty micro-batch is 0 and ties the loss to the model whatever the channels read.
            self._trained.backward(result.loss + _tie(output))
            meter.add(result)
            slots.add(micro.area, micro.tokens)
            works.append(micro.work)
        self.work = Work.joined(works)
        if self._teacher is not None:
            self._teacher.release()
        return meter.reduce() | slots.reduce()

    def _channel_by_channel(
        self, rows: RankRows, objective: Objective, prepared: dict[str, Prepared], count: int
    ) -> dict[str, float]:
        """A pass for each channel, so that the norm of its own gradient can be read; the sum is the same."""
        metrics = {"loss": 0.0}
        total = {name: shard.local.clone() for name, shard in self._trained.gradient().items()}
        for channel in objective.live:
            self._trained.drop_gradient()
            found = self._accumulate(rows, objective.only(channel), prepared, count)
            metrics |= {name: value for name, value in found.items() if name != "loss"}
            metrics["loss"] += found["loss"]
            metrics[f"{channel}/grad_norm"] = self._grad_norm()
            for name, shard in self._trained.gradient().items():
                total[name] = total[name] + shard.local if name in total else shard.local.clone()
        for name, shard in self._trained.gradient().items():
            shard.fill(total[name])
        return metrics

    def optim_step(self) -> dict[str, float]:
        """See TrainEngine."""
        gradient = [shard.local for shard in self._trained.gradient().values()]
        if not gradient:
            raise RuntimeError("optim_step without a gradient: call forward_backward first")
        norm = self._grad_norm()
        lr = self._trainer.lr * multiplier(
            self._trainer.schedule, self._progress.steps + 1, self._total_steps, self._trainer.warmup_steps
        )
        skipped = not (self._finite and math.isfinite(norm))
        if not skipped:
            torch._foreach_mul_(gradient, min(1.0, self._trainer.max_grad_norm / (norm + 1e-6)))
            self._trained.step(lr)
        self._trained.drop_gradient()
        steps, applied = self._progress.steps + 1, self._progress.applied + (not skipped)
        self._progress, self._finite = state.Progress(steps, applied), True  # the schedule goes on, as the run does
        if self._teacher is not None and not skipped:
            self._teacher.follow(self._trained.weights())
        return {"grad_norm": norm, "lr": lr, "skipped": float(skipped)}

    def _grad_norm(self) -> float:
        """Of the gradient over all ranks, each element counted once."""
        shards = list(self._trained.gradient().values())
        norms = torch.stack(torch._foreach_norm([shard.local for shard in shards]))
        copies = torch.tensor([shard.copies for shard in shards], dtype=torch.float64)
        squares = norms.double().cpu().square() / copies
        return math.sqrt(reduce_floats([squares.sum().item()], dist.ReduceOp.SUM)[0])

    def save_state(self, folder: Path) -> None:
        """See TrainEngine."""
        place = state.Place(Path(folder), self._rank, self._world_size)
        state.save(place, self._trained.weights(), self._trained.moments(), self._progress)
        if self._teacher is not None:
            state.save_weights(place, TEACHER, self._teacher.saved)

    def load_state(self, folder: Path) -> None:
        """See TrainEngine."""
        place = state.Place(Path(folder), self._rank, self._world_size)
        self._trained.drop_gradient()
        self._progress = state.load(place, self._trained.weights(), self._trained.moments(), self._seed)
        self._trained.resume(self._progress.applied)
        if self._teacher is not None:
            state.load_weights(place, TEACHER, self._teacher.saved)
            self._teacher.restored()

    def offload(self, *, weights: bool = True) -> int:
        """See TrainEngine."""
        teacher = None if self._teacher is None else self._teacher.beside
        return self._resting.offload(self._trained, teacher, weights=weights)

    def onload(self, *, optimizer: bool = True) -> None:
        """See TrainEngine."""
        self._resting.onload(optimizer=optimizer)

    def export_weights(
        self, dtype: torch.dtype, *, adapter: bool = True, on_device: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """See TrainEngine."""
        names, whole = self._trained.names, self._trained.whole
        weights: Iterator[tuple[str, torch.Tensor]] = ((name, whole(name, dtype)) for name in names)
        if self._adapter is not None:
            weights = merged_weights(names, whole, self._adapter, dtype, on=adapter)
        for name, weight in weights:
            yield name, weight.to("cpu" if self._rank == 0 and not on_device else self._device)

    def export_adapter(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See TrainEngine."""
        if self._adapter is None:
            raise RuntimeError("the model has no adapter")
        for name, weight in adapter_weights(self._trained.names, self._trained.whole, self._adapter, dtype):
            yield name, weight.to("cpu" if self._rank == 0 else self._device)

    def _rows(self, batch: DataProto, objective: Objective | None = None) -> RankRows:
        wanted = {} if objective is None else {
            "sequences": objective.sequences, "teacher": objective.divergence is not None,
            "pack_teacher": self._teacher is not None and self._teacher.packs,
        }  # fmt: skip
        return RankRows(
            batch,
            () if objective is None else objective.reads,
            max_length=self._max_length,
            token_budget=self._trainer.micro_batch_tokens * self._trainer.sequence_ranks,
            packing=packs(self._model.lm),
            divide=packed_batches if self._sequence is None else self._sequence.divide,
            share_prompts=self._trainer.rows == "shared",
            **wanted,  # type: ignore[arg-type]
        )

    def _run(self, micro: MicroBatch, objective: Objective | None = None) -> ForwardOutput:
        if isinstance(self._model, ValueModel):
            values = self._trained.run(micro.input_ids, micro.positions, micro.packing)
            values = micro.spread(values if micro.part is None else micro.part.values(values))
            return ForwardOutput(torch.zeros_like(values), torch.zeros_like(values), values=values)
        entropy_gradient = objective is not None and objective.entropy_gradient
        inputs = None
        if objective is not None and objective.divergence is not None:
            if self._teacher is None or micro.teacher is None:
                raise RuntimeError("the objective asks for a teacher, and the engine was loaded without one")
            inputs = self._teacher.look(micro.teacher, objective.divergence)
        output = self._trained.run(
            micro.input_ids, micro.positions, micro.targets, entropy_gradient, inputs, packing=micro.packing
        )
        if micro.part is not None:
            output = micro.part.output(output)
        pairs = {side: micro.spread(output.logprobs, side) for side in micro.scored if side != "response"}
        teacher = None
        if inputs is not None:
            assert micro.teacher is not None
            teacher = TeacherOutput(*(_place(values, micro) for values in output[2:]))
        return ForwardOutput(micro.spread(output.logprobs), micro.spread(output.entropy), pairs, teacher)

    def _cut(self, rows: RankRows, count: int) -> Iterator[MicroBatch]:
        batches = rows.cut(count, self._device)
        return batches if self._sequence is None else map(self._sequence.share, batches)

    def _busiest(self, rows: RankRows) -> int:
        """Micro-batches that every rank runs: gathering weights and reducing gradients are collectives."""
        return int(reduce_floats([len(rows.plan)], dist.ReduceOp.MAX)[0])


def _place(values: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
    """[n] values of the tokens that the divergence is about as [N] values of response tokens, 0 on the others."""
    assert micro.teacher is not None
    return values.new_zeros(len(micro.token_index)).index_copy(0, micro.teacher.place, values)


def _tie(output: ForwardOutput) -> torch.Tensor:
    """0, with a path to the model: a pass without any token still has a backward pass, which is a collective."""
    parts = [output.logprobs, *output.pair_logprobs.values()]
    if output.values is not None:
        parts.append(output.values)
    return sum((part.new_zeros(()) + part[:0].sum() for part in parts), torch.zeros((), device=parts[0].device))
