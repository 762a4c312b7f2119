"""FSDP2: every rank holds a slice of each weight, its gradient and its optimiser state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.algorithms.objective import ForwardOutput, Objective, Prepared, TeacherOutput
from rlsys.algorithms.schedules import multiplier, no_decay
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import state
from rlsys.engines.train.collectives import Meter, Ranks, reduce_floats, training_device
from rlsys.engines.train.model import PREFIX, PolicyModel, ValueModel, context_length, load_causal_lm
from rlsys.engines.train.rows import MicroBatch, RankRows
from rlsys.engines.train.teacher import Teacher

TEACHER = "teacher"  # name of a teacher's shards in a checkpoint


class FsdpEngine:
    """One rank. Weights and optimiser are float32; the forward pass runs in ``model.dtype``.

    Gradients are reduced after every micro-batch: keeping them whole until the last one would save communication and
    cost each rank a full-sized gradient, which is what sharding is there to avoid.
    """

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        trainer: TrainerConfig,
        *,
        max_length: int,
        total_steps: int,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        self._model, self._trainer, self._teacher = model, trainer, teacher
        self._max_length, self._total_steps, self._seed = max_length, total_steps, seed
        self._device = training_device()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._parameters: dict[str, DTensor] = {
            name.removeprefix(PREFIX): parameter for name, parameter in model.named_parameters()
        }
        self.parameter_count = sum(parameter.numel() for parameter in self._parameters.values())
        self._optimizer = _adamw(self._parameters, trainer)
        self._steps, self._finite = 0, True
        state.seed_generators(seed, self._rank, self._steps)

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
    ) -> FsdpEngine:
        """Reads the model and shards it over the initialised process group.

        Args:
            temperature: of the sampler; logits are divided by it.
            total_steps: optimiser steps that the learning-rate schedule spans.
            seed: of the run.
            distillation: the teacher that a channel of the objective asks for; None: none does.
            critic: a value model instead of a policy.

        Raises:
            UserError: the model cannot be used (see ``rlsys.engines.train.model``).
        """
        lm = load_causal_lm(model, torch.float32)
        max_length, dtype = context_length(lm), getattr(torch, model.dtype)
        if trainer.activation_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            lm.train()  # transformers recomputes in training mode only; there is no dropout that it would switch on
        if critic:
            values = ValueModel(lm)
            _shard(values, dtype)
            return cls(values, trainer, max_length=max_length, total_steps=total_steps, seed=seed)
        chunk = trainer.logprob_chunk_tokens
        policy = PolicyModel(lm, temperature=temperature, chunk=chunk)
        _shard(policy, dtype)
        teacher = None
        if distillation is not None:
            teacher = Teacher.load(
                distillation, model, policy, lambda other: _shard(other, dtype), temperature=temperature, chunk=chunk
            )
        return cls(policy, trainer, max_length=max_length, total_steps=total_steps, seed=seed, teacher=teacher)

    @torch.no_grad()
    def forward(self, batch: DataProto) -> DataProto:
        """See TrainEngine."""
        rows = self._rows(batch)
        columns: dict[str, torch.Tensor] = {}
        for micro in rows.cut(self._busiest(rows), self._device):
            output = self._run(micro)
            found = {"logprobs": output.logprobs, "entropy": output.entropy}
            for name, values in (found if output.values is None else {"values": output.values}).items():
                columns.setdefault(name, torch.zeros(rows.num_tokens, device=self._device))[micro.token_index] = values
        # Without a backward pass the root's weights would stay gathered, and go stale with the next optimiser step.
        self._model.reshard()
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
        area = float(metrics.pop("area"))
        tokens, inputs = reduce_floats([rows.total, rows.num_inputs], dist.ReduceOp.SUM)
        return metrics | {
            "tokens": tokens,
            "padding_fraction": 1 - inputs / area if area else 0.0,
            "micro_batches": float(count),
        }

    def _accumulate(
        self, rows: RankRows, objective: Objective, prepared: dict[str, Prepared], count: int
    ) -> dict[str, float]:
        """One pass over the rows; the gradient is added up in the parameters. Returns metrics, and ``area``: tokens of
        the padded inputs."""
        meter, area = Meter(), 0
        for micro in rows.cut(count, self._device):
            output = self._run(micro, objective)
            result = objective.loss(micro.response, output, prepared, micro.token_index)
            # The sum over an empty micro-batch is 0 and ties the loss to the model whatever the channels read.
            (result.loss + _tie(output)).backward()
            meter.add(result)
            area += micro.input_ids.numel() + (micro.teacher.input_ids.numel() if micro.teacher is not None else 0)
        if self._teacher is not None:
            self._teacher.release()
        return meter.reduce() | {"area": reduce_floats([area], dist.ReduceOp.SUM)[0]}

    def _channel_by_channel(
        self, rows: RankRows, objective: Objective, prepared: dict[str, Prepared], count: int
    ) -> dict[str, float]:
        """A pass for each channel, so that the norm of its own gradient can be read; the sum is the same."""
        metrics = {"loss": 0.0, "area": 0.0}
        total = {name: p.grad for name, p in self._parameters.items()}
        for channel in objective.live:
            for parameter in self._parameters.values():
                parameter.grad = None
            found = self._accumulate(rows, objective.only(channel), prepared, count)
            metrics |= {name: value for name, value in found.items() if name not in ("loss", "area")}
            metrics["loss"] += found["loss"]
            metrics["area"] = found["area"]  # of one pass
            metrics[f"{channel}/grad_norm"] = self._grad_norm()
            for name, parameter in self._parameters.items():
                before = total[name]
                total[name] = parameter.grad if before is None or parameter.grad is None else before + parameter.grad
        for name, parameter in self._parameters.items():
            parameter.grad = total[name]
        return metrics

    def optim_step(self) -> dict[str, float]:
        """See TrainEngine."""
        if all(p.grad is None for p in self._parameters.values()):
            raise RuntimeError("optim_step without a gradient: call forward_backward first")
        norm = self._grad_norm()
        lr = self._trainer.lr * multiplier(
            self._trainer.schedule, self._steps + 1, self._total_steps, self._trainer.warmup_steps
        )
        skipped = not (self._finite and math.isfinite(norm))
        if not skipped:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters.values(), self._trainer.max_grad_norm, torch.tensor(norm, device=self._device)
            )
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps, self._finite = self._steps + 1, True  # the schedule goes on, as the run does
        if self._teacher is not None and not skipped:
            self._teacher.follow()
        return {"grad_norm": norm, "lr": lr, "skipped": float(skipped)}

    def _grad_norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def save_state(self, folder: Path) -> None:
        """See TrainEngine."""
        place = state.Place(Path(folder), self._rank, self._world_size)
        state.save(place, self._parameters, self._optimizer, self._steps)
        if self._teacher is not None:
            state.save_weights(place, TEACHER, self._teacher.saved)

    def load_state(self, folder: Path) -> None:
        """See TrainEngine."""
        place = state.Place(Path(folder), self._rank, self._world_size)
        self._optimizer.zero_grad(set_to_none=True)
        self._steps = state.load(place, self._parameters, self._optimizer, self._seed)
        if self._teacher is not None:
            state.load_weights(place, TEACHER, self._teacher.saved)

    def export_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See TrainEngine."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().to(dtype).full_tensor().to("cpu" if self._rank == 0 else self._device)

    def _rows(self, batch: DataProto, objective: Objective | None = None) -> RankRows:
        wanted = {} if objective is None else {
            "sequences": objective.sequences, "teacher": objective.divergence is not None
        }  # fmt: skip
        return RankRows(
            batch,
            () if objective is None else objective.reads,
            max_length=self._max_length,
            token_budget=self._trainer.micro_batch_tokens,
            **wanted,  # type: ignore[arg-type]
        )

    def _run(self, micro: MicroBatch, objective: Objective | None = None) -> ForwardOutput:
        if isinstance(self._model, ValueModel):
            values = micro.spread(self._model(micro.input_ids, micro.positions))
            return ForwardOutput(torch.zeros_like(values), torch.zeros_like(values), values=values)
        entropy_gradient = objective is not None and objective.entropy_gradient
        inputs = None
        if objective is not None and objective.divergence is not None:
            if self._teacher is None or micro.teacher is None:
                raise RuntimeError("the objective asks for a teacher, and the engine was loaded without one")
            inputs = self._teacher.look(micro.teacher, objective.divergence)
        output = self._model(micro.input_ids, micro.positions, micro.targets, entropy_gradient, inputs)
        pairs = {side: micro.spread(output.logprobs, side) for side in micro.scored if side != "response"}
        teacher = None
        if inputs is not None:
            assert micro.teacher is not None
            teacher = TeacherOutput(*(_place(values, micro) for values in output[2:]))
        return ForwardOutput(micro.spread(output.logprobs), micro.spread(output.entropy), pairs, teacher)

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


def _shard(model: PolicyModel | ValueModel, dtype: torch.dtype) -> None:
    """One FSDP unit a decoder layer; embedding, final norm and head in the root's. Gradients are summed over ranks (and
    not averaged), in float32: the loss is divided by the global normaliser already."""
    mesh = init_device_mesh(training_device().type, (dist.get_world_size(),))
    precision = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    for layer in getattr(model.lm.base_model, "layers", ()):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _adamw(parameters: dict[str, DTensor], trainer: TrainerConfig) -> torch.optim.AdamW:
    decayed = [p for name, p in parameters.items() if not no_decay(name, p.ndim)]
    plain = [p for name, p in parameters.items() if no_decay(name, p.ndim)]
    groups = [{"params": decayed, "weight_decay": trainer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.lr,
        betas=(trainer.beta1, trainer.beta2),
        eps=trainer.eps,
        fused=True,
    )
