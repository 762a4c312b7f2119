"""Train engines: one rank each of a group that holds the policy, its gradient and its optimiser."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train.base import TrainEngine
from rlsys.engines.train.collectives import init_process_group

if TYPE_CHECKING:
    from rlsys.engines.train.engine import ShardedEngine

__all__ = ["TrainEngine", "check_backend", "init_process_group", "load_engine"]


def check_backend(trainer: TrainerConfig) -> None:
    """That the back end's package is installed, without importing it.

    Raises:
        UserError: it is not.
    """
    if trainer.backend == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "ZeRO-3 is DeepSpeed's, which is not installed",
            where="trainer.backend",
            fix="pip install rlsys[deepspeed], or trainer=fsdp",
        )


def load_engine(
    model: ModelConfig,
    trainer: TrainerConfig,
    *,
    temperature: float,
    total_steps: int,
    seed: int,
    distillation: DistillationConfig | None = None,
    critic: bool = False,
    longest: int | None = None,
) -> TrainEngine:
    """This rank's engine of the kind ``trainer.backend``, with the model loaded. The process group is initialised.

    Args:
        temperature: of the sampler; logits are divided by it.
        total_steps: optimiser steps that the learning-rate schedule spans.
        seed: of the run.
        distillation: the teacher that a channel of the objective asks for; None: none does.
        critic: a value model instead of a policy.
        longest: prompt and response of the run together, in tokens: what the sampler was started with; None: what the
            model allows. Models whose positions depend on it (LongRoPE, dynamic NTK) are rotated by it.

    Raises:
        UserError: the back end is not installed or cannot do what ``trainer`` says, or the model cannot be used.
    """
    check_backend(trainer)
    return _engine(trainer.backend).load(
        model,
        trainer,
        temperature=temperature,
        total_steps=total_steps,
        seed=seed,
        distillation=distillation,
        critic=critic,
        longest=longest,
    )


def _engine(backend: str) -> type[ShardedEngine]:
    # Imported here: transformers takes seconds, and the driver never needs it.
    if backend == "zero3":
        from rlsys.engines.train.zero3 import Zero3Engine

        return Zero3Engine
    from rlsys.engines.train.fsdp import FsdpEngine

    return FsdpEngine
