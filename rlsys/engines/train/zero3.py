"""DeepSpeed ZeRO-3: every rank holds a range of the elements of each weight, its gradient and its optimiser state."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from rlsys.checkpoint.shards import Shard
from rlsys.config.schema import TrainerConfig
from rlsys.engines.train.base import ShardedModel, TrainedModel
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.engine import ShardedEngine
from rlsys.engines.train.held import hold
from rlsys.engines.train.lora import count_parameters, plain_name
from rlsys.engines.train.model import PREFIX, PolicyModel, ValueModel
from rlsys.engines.train.optimizer import adamw
from rlsys.engines.train.state import MOMENTS

_BUCKET = 50_000_000  # elements that are gathered ahead, or reduced, at once


class Zero3Engine(ShardedEngine):
    """See ShardedEngine."""

    @staticmethod
    def train(model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> TrainedModel:
        return Zero3Trained(model, trainer, dtype)

    @staticmethod
    def freeze(model: PolicyModel, trainer: TrainerConfig, dtype: torch.dtype, *, moves: bool) -> ShardedModel:
        return Zero3Frozen(model, trainer, dtype, moves=moves)


class Zero3Trained:
    """See TrainedModel.

    DeepSpeed averages over ranks and over a fixed number of micro-batches, and skips updates by a rule of its own. Here
    the loss is multiplied by the number of ranks, a step ends when its caller says so, and what is clipped or skipped
    is decided before DeepSpeed's step sees the gradient.
    """

    def __init__(self, model: PolicyModel | ValueModel, trainer: TrainerConfig, dtype: torch.dtype) -> None:
        self.model, self._ranks = model, dist.get_world_size()
        every = {plain_name(name.removeprefix(PREFIX)): parameter for name, parameter in model.named_parameters()}
        named = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
        self.parameter_count, self.trained_count = count_parameters(model)
        exact = _exact(named, dtype)
        optimizer = adamw(named, trainer)
        _carry_gradient(model.lm)
        self._engine = _initialize(model, _config(model, trainer, dtype), optimizer)
        self._zero = self._engine.optimizer
        self.run = self._engine
        self._parameters, self._every, self.names = named, every, tuple(every)
        self._offloads = trainer.offload != "none"
        self._added, self._final = False, False
        if exact:  # DeepSpeed makes float32 weights of those that it has rounded
            for name, shard in self.weights().items():
                if name in exact:
                    shard.fill(exact[name].view(-1)[shard.start : shard.stop])
            self.moved()

    def weights(self) -> dict[str, Shard]:
        return {name: _slice(p, self._state(p)) for name, p in self._parameters.items()}

    def moved(self) -> None:
        self.release()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def release(self) -> None:
        self._zero.parameter_offload.partition_all_parameters()

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self._ranks, scale_wrt_gas=False)
        self._added, self._final = True, False

    def gradient(self) -> dict[str, Shard]:
        if not self._added:
            return {}
        if self._offloads and not self._final:  # from where it is added up to where the optimiser reads it
            self._zero.finalize_gradient_accumulation_boundary()
        self._final = True
        return {
            name: _slice(p, self._zero._get_fp32_grad_state_partition(p, True)[0])
            for name, p in self._parameters.items()
        }

    def drop_gradient(self) -> None:
        self._zero._pre_step()  # the next backward pass overwrites
        self._zero.reset_cpu_buffers()
        self._added = False

    def step(self, lr: float) -> None:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._zero.step()

    def moments(self) -> dict[str, Shard]:
        state = self._zero.optimizer.state
        for flat in self._zero.fp32_partitioned_groups_flat:
            if not state[flat]:
                state[flat] = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS} | {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device)
                }
        return {
            f"{moment}/{name}": _slice(p, self._state(p, moment))
            for name, p in self._parameters.items()
            for moment in MOMENTS
        }

    def optimizer_memory(self) -> Iterator[torch.Tensor]:
        """DeepSpeed's own buffers: moments, and where gradients are added up."""
        zero = self._zero
        for entry in zero.optimizer.state.values():
            yield from (value for value in entry.values() if isinstance(value, torch.Tensor))
        yield zero.grad_partitions_flat_buffer
        yield from (bucket.buffer for bucket in zero.ipg_buckets.values() if bucket.buffer is not None)

    def resume(self, steps: int) -> None:
        for entry in self._zero.optimizer.state.values():
            entry["step"].fill_(steps)
        self.moved()

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        parameter: Any = self._every[name]
        mine = self._state(parameter) if parameter.requires_grad else parameter.ds_tensor
        mine = mine.detach().view(-1).to(training_device(), dtype)
        every = mine.new_empty(self._ranks * mine.numel())
        dist.all_gather(list(every.chunk(self._ranks)), mine)
        return every[: parameter.ds_numel].view(parameter.ds_shape)

    def _state(self, parameter: nn.Parameter, moment: str | None = None) -> torch.Tensor:
        """This rank's elements of a float32 weight, or of a moment; the last rank's padded."""
        return self._zero._get_fp32_opt_state_partition(parameter, True, moment)[0]


class Zero3Frozen:
    """See ShardedModel. moves: its weights will be written to, so float32 ones are kept beside those of ``dtype``."""

    def __init__(self, model: PolicyModel, trainer: TrainerConfig, dtype: torch.dtype, *, moves: bool) -> None:
        self.model = model
        named = {name.removeprefix(PREFIX): parameter for name, parameter in model.named_parameters()}
        exact = _exact(named, dtype) if moves else {}
        self._engine = _initialize(model, _config(model, trainer, dtype), None)
        self._parameters, device = named, training_device()
        self._held: dict[str, torch.Tensor] = {}
        for name, parameter in named.items() if moves and dtype != torch.float32 else ():
            part = _slice(parameter, parameter.ds_tensor)
            mine = exact[name].view(-1)[part.start : part.stop] if name in exact else part.local
            self._held[name] = mine.to(device, torch.float32, copy=True)

    def weights(self) -> dict[str, Shard]:
        shards = {name: _slice(p, p.ds_tensor) for name, p in self._parameters.items()}
        return {name: Shard(self._held.get(name, s.local), s.shape, s.start) for name, s in shards.items()}

    def moved(self) -> None:
        self.release()
        for name, held in self._held.items():
            _slice(self._parameters[name], self._parameters[name].ds_tensor).fill(held)

    def release(self) -> None:
        self._engine.optimizer.partition_all_parameters()


def _exact(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The float32 weights, where DeepSpeed is going to replace them by others of ``dtype``."""
    if dtype == torch.float32:
        return {}
    return {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items() if p.dtype != dtype}


def _carry_gradient(lm: PreTrainedModel) -> None:
    """Has the gradient go through the first layer to its input, even if the embedding is frozen: DeepSpeed takes its
    arrival there as the sign that a layer's weights may go."""
    embedding = lm.get_input_embeddings()
    if embedding.weight.requires_grad:
        return

    def mark(_module: nn.Module, _inputs: Any, states: torch.Tensor) -> torch.Tensor:
        return states.requires_grad_(torch.is_grad_enabled())

    embedding.register_forward_hook(mark)


def _slice(parameter: Any, partition: torch.Tensor) -> Shard:
    """ZeRO-3 cuts elements into equal parts, rounded up; what is past the end of the last is padding."""
    size, rank = parameter.ds_tensor.ds_numel, dist.get_rank()
    start = min(rank * size, parameter.ds_numel)
    count = min(size, parameter.ds_numel - start)
    return Shard(partition.detach().view(-1)[:count], tuple(parameter.ds_shape), start)


def _initialize(model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    """A DeepSpeedEngine around the model; its weights lie on the training device, or where the config says."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would look for other hardware
    os.environ.setdefault("LOCAL_RANK", "0")  # a rank sees its own GPU alone
    import deepspeed

    # A kernel for collectives between processes of one host would be compiled here, on every machine; nothing below
    # uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r".*(reduce_scatter|all_gather_into)_tensor` is deprecated", FutureWarning)
    layers = {type(layer) for layer in getattr(model.lm.base_model, "layers", ())}
    if layers:  # gathered as one
        deepspeed.utils.set_z3_leaf_modules(model, list(layers))
    _partition(model, config)
    parameters = None if optimizer is None else [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)
    if isinstance(model, PolicyModel):  # the head's weight is read outside its own module
        head = model.lm.get_output_embeddings()
        for parameter in filter(None.__ne__, (head.weight, head.bias)):
            deepspeed.zero.register_external_parameter(model, parameter)
    return engine


def _partition(model: nn.Module, config: dict[str, Any]) -> None:
    """Casts and cuts one weight after the other, so that host and device hold no more than one of them whole:
    deepspeed.initialize would move all of the model there first. Its weights are of the dtype of the forward pass
    afterwards."""
    import deepspeed

    half = config["bf16"]["enabled"]

    def cast() -> Iterator[nn.Parameter]:
        for parameter in model.parameters():
            hold([parameter])
            if half and parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
            yield parameter

    # Its constructor would do the same with all weights as they are.
    deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config))._convert_to_zero_parameters(cast())
    for buffer in model.buffers():  # which are never cut
        buffer.data = buffer.data.to(training_device())


def _config(model: nn.Module, trainer: TrainerConfig, dtype: torch.dtype) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    bucket = min(_BUCKET, sum(parameter.numel() for parameter in model.parameters()))
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": bucket if cuda else 0,  # on CPUs nothing is gathered while something computes
    }
    if trainer.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if trainer.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
