"""FSDP2: every rank holds a slice of each weight, its gradient and its optimiser state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.algorithms.objective import ForwardOutput, Objective
from rlsys.algorithms.schedules import multiplier, no_decay
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train import state
from rlsys.engines.train.collectives import Meter, reduce_floats, training_device
from rlsys.engines.train.model import PolicyModel, context_length, load_causal_lm
from rlsys.engines.train.rows import MicroBatch, RankRows

_PREFIX = "lm."  # of the model's parameter names inside PolicyModel


class FsdpEngine:
    """One rank. Weights and optimiser are float32; the forward pass runs in ``model.dtype``.

    Gradients are reduced after every micro-batch: keeping them whole until the last one would save communication and
    cost each rank a full-sized gradient, which is what sharding is there to avoid.
    """

    def __init__(
        self, policy: PolicyModel, trainer: TrainerConfig, *, max_length: int, total_steps: int, seed: int
    ) -> None:
        self._policy, self._trainer = policy, trainer
        self._max_length, self._total_steps, self._seed = max_length, total_steps, seed
        self._device = training_device()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._parameters: dict[str, DTensor] = {
            name.removeprefix(_PREFIX): parameter for name, parameter in policy.named_parameters()
        }
        self.parameter_count = sum(parameter.numel() for parameter in self._parameters.values())
        self._optimizer = _adamw(self._parameters, trainer)
        self._steps = 0
        state.seed_generators(seed, self._rank, self._steps)

    @classmethod
    def load(
        cls, model: ModelConfig, trainer: TrainerConfig, *, temperature: float, total_steps: int, seed: int
    ) -> FsdpEngine:
        """Reads the model and shards it over the initialised process group.

        Args:
            temperature: of the sampler; logits are divided by it.
            total_steps: optimiser steps that the learning-rate schedule spans.
            seed: of the run.

        Raises:
            UserError: the model cannot be used (see ``rlsys.engines.train.model``).
        """
        lm = load_causal_lm(model, torch.float32)
        max_length = context_length(lm)
        if trainer.activation_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            lm.train()  # transformers recomputes in training mode only; there is no dropout that it would switch on
        policy = PolicyModel(lm, temperature=temperature, chunk=trainer.logprob_chunk_tokens)
        _shard(policy, getattr(torch, model.dtype))
        return cls(policy, trainer, max_length=max_length, total_steps=total_steps, seed=seed)

    @torch.no_grad()
    def forward(self, batch: DataProto) -> DataProto:
        """See TrainEngine."""
        rows = self._rows(batch)
        logprobs = torch.zeros(rows.num_tokens, device=self._device)
        entropy = torch.zeros_like(logprobs)
        for micro in rows.cut(self._busiest(rows), self._device):
            output = _run(self._policy, micro)
            logprobs[micro.token_index], entropy[micro.token_index] = output.logprobs, output.entropy
        # Without a backward pass the root's weights would stay gathered, and go stale with the next optimiser step.
        self._policy.reshard()
        columns = {"logprobs": logprobs, "entropy": entropy}
        lengths = rows.response_lengths
        return DataProto.from_dict(tensors={n: jagged.from_values(c.cpu(), lengths) for n, c in columns.items()})

    def forward_backward(self, batch: DataProto, objective: Objective) -> dict[str, float]:
        """See TrainEngine."""
        rows = self._rows(batch, objective.reads)
        normalisers = _over_ranks(objective.normalisers(rows.whole()))
        count = self._busiest(rows)
        meter, area = Meter(), 0.0
        for micro in rows.cut(count, self._device):
            output = _run(self._policy, micro, objective.entropy_gradient)
            result = objective.loss(micro.response, output, normalisers)
            # The sum over an empty micro-batch is 0 and ties the loss to the model whatever the channels read.
            loss = result.loss if micro.response.num_rows else result.loss + output.logprobs.sum()
            loss.backward()
            meter.add(result)
            area += micro.input_ids.numel()
        metrics = meter.reduce()
        tokens, inputs, area = reduce_floats([int(rows.lengths.sum()), rows.num_inputs, area], dist.ReduceOp.SUM)
        return metrics | {
            "tokens": tokens,
            "padding_fraction": 1 - inputs / area if area else 0.0,
            "micro_batches": float(count),
        }

    def optim_step(self) -> dict[str, float]:
        """See TrainEngine."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not gradients:
            raise RuntimeError("optim_step without a gradient: call forward_backward first")
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of optimiser step {self._steps + 1} is {norm.item()}; the weights are as they were"
            )
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._trainer.max_grad_norm, norm)
        lr = self._trainer.lr * multiplier(
            self._trainer.schedule, self._steps + 1, self._total_steps, self._trainer.warmup_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return {"grad_norm": norm.item(), "lr": lr}

    def save_state(self, folder: Path) -> None:
        """See TrainEngine."""
        place = state.Place(Path(folder), self._rank, self._world_size)
        state.save(place, self._parameters, self._optimizer, self._steps)

    def load_state(self, folder: Path) -> None:
        """See TrainEngine."""
        place = state.Place(Path(folder), self._rank, self._world_size)
        self._optimizer.zero_grad(set_to_none=True)
        self._steps = state.load(place, self._parameters, self._optimizer, self._seed)

    def export_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See TrainEngine."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().to(dtype).full_tensor().to("cpu" if self._rank == 0 else self._device)

    def _rows(self, batch: DataProto, reads: tuple[str, ...] = ()) -> RankRows:
        return RankRows(batch, reads, max_length=self._max_length, token_budget=self._trainer.micro_batch_tokens)

    def _busiest(self, rows: RankRows) -> int:
        """Micro-batches that every rank runs: gathering weights and reducing gradients are collectives."""
        return int(reduce_floats([len(rows.plan)], dist.ReduceOp.MAX)[0])


def _run(policy: torch.nn.Module, micro: MicroBatch, entropy_gradient: bool = False) -> ForwardOutput:
    logprobs, entropy = policy(micro.input_ids, micro.positions, micro.targets, entropy_gradient)
    return ForwardOutput(micro.spread(logprobs), micro.spread(entropy))


def _over_ranks(local: dict[str, float | None]) -> dict[str, float | None]:
    divided = {name: value for name, value in local.items() if value is not None}
    totals = reduce_floats(list(divided.values()), dist.ReduceOp.SUM) if divided else []
    return {**local, **dict(zip(divided, totals, strict=True))}


def _shard(policy: PolicyModel, dtype: torch.dtype) -> None:
    """One FSDP unit a decoder layer; embedding, final norm and head in the root's. Gradients are summed over ranks (and
    not averaged), in float32: the loss is divided by the global normaliser already."""
    mesh = init_device_mesh(training_device().type, (dist.get_world_size(),))
    precision = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    for layer in getattr(policy.lm.base_model, "layers", ()):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
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
