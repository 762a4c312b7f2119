"""Train engines: one rank each of a group that holds the policy, its gradient and its optimiser."""

from __future__ import annotations

from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train.base import TrainEngine
from rlsys.engines.train.collectives import init_process_group

__all__ = ["TrainEngine", "init_process_group", "load_engine"]


def load_engine(
    model: ModelConfig,
    trainer: TrainerConfig,
    *,
    temperature: float,
    total_steps: int,
    seed: int,
    distillation: DistillationConfig | None = None,
    critic: bool = False,
) -> TrainEngine:
    """This rank's engine of the kind ``trainer.backend``, with the model loaded. The process group is initialised.

    Args:
        temperature: of the sampler; logits are divided by it.
        total_steps: optimiser steps that the learning-rate schedule spans.
        seed: of the run.
        distillation: the teacher that a channel of the objective asks for; None: none does.
        critic: a value model instead of a policy.
    """
    from rlsys.engines.train.fsdp import FsdpEngine  # transformers takes seconds to import, the driver never needs it

    return FsdpEngine.load(
        model,
        trainer,
        temperature=temperature,
        total_steps=total_steps,
        seed=seed,
        distillation=distillation,
        critic=critic,
    )
