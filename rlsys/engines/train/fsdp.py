"""FSDP2: every rank holds a slice of each weight, its gradient and its optimiser state."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.algorithms.schedules import no_decay
from rlsys.checkpoint.shards import Shard
from rlsys.config.schema import TrainerConfig
from rlsys.engines.train.base import ShardedModel, TrainedModel
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.engine import ShardedEngine
from rlsys.engines.train.model import PREFIX, PolicyModel, ValueModel
from rlsys.engines.train.state import MOMENTS


class FsdpEngine(ShardedEngine):
    """See ShardedEngine."""

    @staticmethod
    def train(model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> TrainedModel:
        return FsdpTrained(model, trainer, dtype)

    @staticmethod
    def freeze(model: PolicyModel, trainer: TrainerConfig, dtype: torch.dtype) -> ShardedModel:
        return FsdpModel(model, trainer, dtype)


class FsdpModel:
    """See ShardedModel."""

    def __init__(self, model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> None:
        _shard(model, dtype)
        self.model = model
        self.parameters: dict[str, DTensor] = {
            name.removeprefix(PREFIX): parameter for name, parameter in model.named_parameters()
        }

    def weights(self) -> dict[str, Shard]:
        return {name: _slice(parameter) for name, parameter in self.parameters.items()}

    def moved(self) -> None:
        """The slices are what the forward pass gathers."""

    def release(self) -> None:
        # Without a backward pass the root's weights would stay gathered, and go stale with the next optimiser step.
        self.model.reshard()


class FsdpTrained(FsdpModel):
    """See TrainedModel."""

    def __init__(self, model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> None:
        super().__init__(model, trainer, dtype)
        self.parameter_count = sum(parameter.numel() for parameter in self.parameters.values())
        self.optimizer = _adamw(self.parameters, trainer)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def gradient(self) -> dict[str, Shard]:
        return {name: _slice(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def moments(self) -> dict[str, Shard]:
        for parameter in self.parameters.values():
            if not self.optimizer.state[parameter]:
                self.optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS} | {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device)
                }
        return {
            f"{moment}/{name}": _slice(self.optimizer.state[parameter][moment])
            for name, parameter in self.parameters.items()
            for moment in MOMENTS
        }

    def resume(self, steps: int) -> None:
        for entry in self.optimizer.state.values():
            entry["step"].fill_(steps)

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.parameters[name].detach().to(dtype).full_tensor()


def _slice(tensor: DTensor) -> Shard:
    """FSDP2 cuts rows into equal chunks, rounded up, so that the last ranks may have fewer or none."""
    local, ranks = tensor.detach().to_local(), dist.get_world_size()
    rows = min(dist.get_rank() * -(-tensor.shape[0] // ranks), tensor.shape[0])
    return Shard(local, tuple(tensor.shape), rows * math.prod(tensor.shape[1:]))


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
