"""model.lora.*: the real engine with an adapter on one rank of a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_batches import process_group, random_batch

from knobs.running import synced
from knobs.table import Bench, entry
from rlsys.config.errors import UserError
from rlsys.config.schema import LoraConfig, ModelConfig, TrainerConfig
from rlsys.engines.train.fsdp import FsdpEngine


def adapted(bench: Bench, **lora: Any) -> FsdpEngine:
    model = ModelConfig(path=str(bench.model), lora=LoraConfig(**lora) if lora else None)
    return FsdpEngine.load(model, TrainerConfig(lr=1e-2), temperature=1.0, total_steps=4, seed=0)


@entry("model.lora.rank", "model.lora.alpha", "model.lora.targets", "model.lora.quantize")
def lora(bench: Bench) -> None:
    with process_group():
        whole, small, large = adapted(bench), adapted(bench, rank=2), adapted(bench, rank=4)
        assert whole.trained_count == whole.parameter_count > large.trained_count == 2 * small.trained_count
        some = adapted(bench, rank=2, targets=["q_proj"])
        assert {name.split(".")[-3] for name in some._trained.weights()} == {"q_proj"}
        assert adapted(bench, rank=2, alpha=4.0)._adapter.scale == 2.0  # type: ignore[union-attr]
        batch = random_batch()
        exact, *rounded = (
            adapted(bench, rank=2, quantize=q).forward(batch).batch["logprobs"].values() for q in (None, "int8", "nf4")
        )
    near, far = ((exact - values).abs().mean() for values in rounded)
    assert 0 < near < far < torch.inf


@entry("model.lora.sync")
def sent(bench: Bench) -> None:
    options = ["model.lora.rank=2", f"model.path={bench.model}"]
    asked = [synced(bench, *options, "rollout=vllm", f"model.lora.sync={what}")[1] for what in ("merged", "adapter")]
    assert [request.adapter for request in asked] == [False, True]
    for refused, more in (
        ("torch sampler", ["rollout=torch"]),
        ("rounded to nf4", ["rollout=vllm", "model.lora.quantize=nf4"]),
        ("whole weights", ["rollout=vllm", "rollout.sync=nccl"]),
    ):
        with pytest.raises(UserError, match=refused):
            bench.config(*options, *more, "model.lora.sync=adapter")
