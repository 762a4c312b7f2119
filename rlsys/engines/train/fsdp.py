"""FSDP2: every rank holds a slice of each weight, its gradient and its optimiser state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.checkpoint.shards import Shard
from rlsys.config.errors import UserError
from rlsys.config.schema import TrainerConfig
from rlsys.engines.train.base import ShardedModel, TrainedModel
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.engine import ShardedEngine
from rlsys.engines.train.held import hold
from rlsys.engines.train.lora import count_parameters, plain_name
from rlsys.engines.train.model import PREFIX, PolicyModel, ValueModel
from rlsys.engines.train.optimizer import adamw
from rlsys.engines.train.state import MOMENTS


class FsdpEngine(ShardedEngine):
    """See ShardedEngine."""

    @staticmethod
    def train(model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> TrainedModel:
        return FsdpTrained(model, trainer, dtype)

    @staticmethod
    def freeze(model: PolicyModel, trainer: TrainerConfig, dtype: torch.dtype, *, moves: bool) -> ShardedModel:
        return FsdpModel(model, trainer, dtype)


class FsdpModel:
    """See ShardedModel."""

    def __init__(self, model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> None:
        _shard(model, trainer, dtype)
        self.model = model
        self.parameters: dict[str, DTensor] = {
            plain_name(name.removeprefix(PREFIX)): parameter for name, parameter in model.named_parameters()
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
        self.parameter_count, self.trained_count = count_parameters(model)
        super().__init__(model, trainer, dtype)
        self._every, self.names = self.parameters, tuple(self.parameters)
        self.parameters = {name: parameter for name, parameter in self._every.items() if parameter.requires_grad}
        self.run: Callable[..., Any] = model
        self.optimizer = adamw(self.parameters, trainer)

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

    def optimizer_memory(self) -> Iterator[torch.Tensor]:
        yield from (p.grad for p in self.parameters.values() if p.grad is not None)
        for entry in self.optimizer.state.values():
            yield from entry.values()

    def resume(self, steps: int) -> None:
        for entry in self.optimizer.state.values():
            entry["step"].fill_(steps)

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._every[name].detach().to(dtype).full_tensor()


def _slice(tensor: DTensor) -> Shard:
    """FSDP2 cuts rows into equal chunks, rounded up, so that the last ranks may have fewer or none."""
    local, mesh = tensor.detach().to_local(), tensor.device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    rows = min(rank * -(-tensor.shape[0] // ranks), tensor.shape[0])
    copies, copy = (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim > 1 else (1, 0)
    return Shard(local, tuple(tensor.shape), rows * math.prod(tensor.shape[1:]), copies, copy)


def _mesh(trainer: TrainerConfig) -> DeviceMesh:
    """All ranks in one dimension, or copies × the ranks that one copy is spread over; neighbours share a copy, which is
    what a fast network joins.

    Raises:
        UserError: the ranks do not divide.
    """
    ranks, device = dist.get_world_size(), training_device().type
    shard = trainer.shard_ranks or ranks
    if ranks % shard:
        raise UserError(
            f"{ranks} trainer ranks cannot be divided into groups of {shard}",
            where="trainer.shard_ranks",
            fix=f"choose a divisor of {ranks}",
        )
    if shard == ranks:
        return init_device_mesh(device, (ranks,))
    return init_device_mesh(device, (ranks // shard, shard), mesh_dim_names=("replicate", "shard"))


def _shard(model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> None:
    """One FSDP unit a decoder layer; embedding, final norm and head in the root's. Gradients are summed over ranks (and
    not averaged), in float32: the loss is divided by the global normaliser already.

    Raises:
        UserError: FSDP2 cannot do what ``trainer`` asks for.
    """
    if trainer.offload == "optimizer":
        raise UserError(
            "FSDP2 keeps the optimiser where the weights are: it offloads both or neither",
            where="trainer.offload",
            fix="trainer.offload=all, or trainer=zero3",
        )
    cuda = training_device().type == "cuda"
    options: dict[str, Any] = {"mesh": _mesh(trainer), "mp_policy": MixedPrecisionPolicy()}
    if dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if trainer.offload == "all":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
    layers = list(getattr(model.lm.base_model, "layers", ()))
    for layer in layers:  # a rank holds one whole layer at a time
        hold(layer.parameters())
        fully_shard(layer, **options)
    hold(model.parameters())
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if cuda:  # a layer's weights are asked for one layer earlier than its own forward pass would
        for layer, after in itertools.pairwise(layers):
            layer.set_modules_to_forward_prefetch([after])
