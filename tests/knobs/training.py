"""model.dtype, model.attention, trainer.* and algorithm.*: the real engine on one rank of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from experiences import make_experience
from torch.distributed.fsdp import CPUOffloadPolicy
from training_batches import process_group, random_batch

from knobs.table import Actors, Bench, entry, updating_trainer
from rlsys.algorithms.channels import PolicyGradient
from rlsys.algorithms.mismatch import mismatch_sums
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.cluster.placement import plan
from rlsys.config.errors import UserError
from rlsys.config.schema import AlgorithmConfig, KLConfig, ModelConfig, TrainerConfig
from rlsys.controller.job import Job
from rlsys.engines.train import load_engine
from rlsys.engines.train.fsdp import FsdpEngine
from rlsys.engines.train.zero3 import Zero3Engine
from rlsys.workers.trainer import ForwardSummary, TrainerWorker

VOCABULARY = 72  # of the tiny model
TRAINER = TrainerConfig(lr=1e-2, micro_batch_tokens=200)
BATCH = random_batch()


def engine(bench: Bench, trainer: TrainerConfig = TRAINER, **model: Any) -> FsdpEngine:
    config = ModelConfig(path=str(bench.model), **model)
    return FsdpEngine.load(config, trainer, temperature=1.0, total_steps=4, seed=0)


def objective(config: AlgorithmConfig, horizon: int = 20) -> Objective:
    return Objective({"policy": (PolicyGradient.from_config(config, horizon=horizon, old_logprobs="column"), 1.0)})


def trained(bench: Bench, **changes: Any) -> torch.Tensor:
    """All weights after three optimiser steps, laid end to end."""
    with process_group():
        ours = engine(bench, replace(TRAINER, **changes))
        for _ in range(3):
            ours.forward_backward(BATCH, objective(AlgorithmConfig()))
            ours.optim_step()
        return torch.cat([weight.flatten() for _, weight in ours.export_weights(torch.float32)])


def loss(bench: Bench, config: AlgorithmConfig) -> float:
    """The objective's value on the batch, before any step."""
    with process_group():
        return engine(bench).forward_backward(BATCH, objective(config))["policy/loss"]


def _optimiser_leaf(leaf: str, value: Any) -> None:
    @entry(f"trainer.{leaf}")
    def check(bench: Bench) -> None:
        assert not torch.equal(trained(bench), trained(bench, **{leaf: value}))


for _leaf, _value in {
    "lr": 1e-3,
    "betas": [0.5, 0.9],
    "eps": 1e-2,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-6,
    "schedule": "linear",
    "warmup_steps": 2,
}.items():
    _optimiser_leaf(_leaf, _value)


@entry("model.dtype")
def model_dtype(bench: Bench) -> None:
    def logprobs(dtype: str) -> torch.Tensor:
        return jagged.values(engine(bench, dtype=dtype).forward(BATCH).batch["logprobs"])

    with process_group():
        assert not torch.equal(logprobs("float32"), logprobs("bfloat16"))


@entry("model.attention")
def attention(bench: Bench) -> None:
    with process_group():
        used = [engine(bench, attention=name)._model.lm.config._attn_implementation for name in ("auto", "eager")]
    assert used == ["rlsys_sdpa", "rlsys_eager"]


@entry("trainer.backend")
def backend(bench: Bench) -> None:
    config = ModelConfig(path=str(bench.model))
    trainers = [replace(TRAINER, backend=name) for name in ("fsdp", "zero3")]
    with process_group():
        made = [load_engine(config, trainer, temperature=1.0, total_steps=1, seed=0) for trainer in trainers]
    assert [type(ours) for ours in made] == [FsdpEngine, Zero3Engine]


@entry("trainer.shard_ranks")
def shard_ranks(bench: Bench) -> None:
    with process_group(), pytest.raises(UserError, match="1 trainer ranks cannot be divided into groups of 2"):
        engine(bench, replace(TRAINER, shard_ranks=2))
    # That weights are replicated and nothing else changes: test_ranks.py


@entry("trainer.sequence_ranks")
def sequence_ranks(bench: Bench) -> None:
    with process_group(), pytest.raises(UserError, match="1 trainer ranks cannot be divided into groups of 2"):
        engine(bench, replace(TRAINER, sequence_ranks=2))
    # That rows are shared and nothing else changes: test_ulysses.py


@entry("trainer.offload")
def offload(bench: Bench) -> None:
    with process_group():
        policies = {
            value: engine(bench, replace(TRAINER, offload=value))._model._get_fsdp_state()._fsdp_param_group
            for value in ("none", "all")
        }
        with pytest.raises(UserError, match="both or neither"):
            engine(bench, replace(TRAINER, offload="optimizer"))
    assert [isinstance(p.offload_policy, CPUOffloadPolicy) for p in policies.values()] == [False, True]


@entry("trainer.ranks")
def ranks(bench: Bench) -> None:
    counts = [len(plan(bench.config(f"trainer.ranks={n}"), gpus=0, cores=4).of("trainer")) for n in (1, 3)]
    assert counts == [1, 3]


@entry("trainer.micro_batch_tokens")
def micro_batch_tokens(bench: Bench) -> None:
    def count(tokens: int) -> float:
        ours = engine(bench, replace(TRAINER, micro_batch_tokens=tokens))
        return ours.forward_backward(BATCH, objective(AlgorithmConfig()))["micro_batches"]

    with process_group():
        assert count(40) > count(1000) == 1


@entry("trainer.activations")
def activations(bench: Bench) -> None:
    with process_group():
        on = [engine(bench, replace(TRAINER, activations=v))._model.lm for v in ("keep", "recompute")]
    assert [lm.is_gradient_checkpointing and lm.training for lm in on] == [False, True]


@entry("trainer.rows")
def packing(bench: Bench) -> None:
    """Tokens and shape of the one micro-batch of a group."""

    def seen(**leaves: str) -> tuple[int, ...]:
        made = engine(bench, replace(TRAINER, micro_batch_tokens=1000, **leaves))
        group = DataProto.from_dict(tensors={
            "prompt_ids": jagged.from_values(torch.ones(8, dtype=torch.int64), torch.tensor([4, 4])),
            "response_ids": jagged.from_values(torch.ones(8, dtype=torch.int64), torch.tensor([3, 5])),
            "response_mask": jagged.from_values(torch.ones(8, dtype=torch.bool), torch.tensor([3, 5])),
        })  # fmt: skip
        (micro,) = made._rows(group).cut(1, torch.device("cpu"))
        return tuple(micro.input_ids.shape)

    with process_group():
        assert seen(rows="padded") == (2, 8)
        assert seen() == (1, 6 + 8)
        assert seen(rows="shared") == (1, 4 + 2 + 4)


@entry("trainer.compile")
def compiled(bench: Bench) -> None:
    with process_group():
        layers = [engine(bench, replace(TRAINER, compile=v))._model.lm.base_model.layers[0] for v in (False, True)]
    assert ["_torchdynamo_orig_callable" in vars(layer.forward) for layer in layers] == [False, True]


@entry("trainer.updates_per_step", "algorithm.old_logprobs")
def updates_per_step(bench: Bench) -> None:
    def updates(*overrides: str) -> tuple[int, bool]:
        trainer = updating_trainer()
        with bench.job("data.prompts_per_step=4", *overrides, trainer=trainer) as job:
            experience = make_experience([[2, 2]] * 4)
            job.load(experience)
            job.update(experience, np.zeros(len(experience)))
        return len(trainer.given("optim_step")), trainer.given("load_batch")[0][1]["bypass"]

    assert updates() == (1, False)
    assert updates("trainer.updates_per_step=2") == (2, False)
    assert updates("algorithm.old_logprobs=sampler") == (1, True)


def advantages(job: Job, reference_kl: np.ndarray | None = None) -> list[float]:
    rewards = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 1.0]
    return job.advantages(make_experience([[2] * 4] * 2, rewards=rewards), reference_kl).tolist()


@entry("algorithm.advantage", "algorithm.advantage_options", "reward.permute")
def advantage(bench: Bench) -> None:
    found = []
    rloo = ["algorithm.advantage=rloo", "~algorithm.advantage_options", "+algorithm.advantage_options={}"]
    for overrides in ([], rloo, ["algorithm.advantage_options.std=none"], ["reward.permute=true"]):
        with bench.job(*overrides) as job:
            found.append(advantages(job))
    assert len({tuple(values) for values in found}) == 4


@entry("algorithm.loss", "algorithm.loss_options", "algorithm.aggregation", "algorithm.entropy_coef")
def loss_terms(bench: Bench) -> None:
    base = AlgorithmConfig()
    changes: list[dict[str, Any]] = [
        {},
        {"loss": "knobs.plugins.reinforce"},
        {"loss_options": {"clip_low": 0.01, "clip_high": 0.01}},
        {"entropy_coef": 0.1},
        *({"aggregation": name} for name in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean")),
        {"aggregation": "seq-mean-token-sum-norm"},
    ]
    values = [loss(bench, replace(base, **change)) for change in changes]
    assert len({round(value, 9) for value in values}) == len(changes)


@entry("algorithm.kl.coef", "algorithm.kl.estimator", "algorithm.kl.placement")
def kl(bench: Bench) -> None:
    in_loss = [KLConfig(), KLConfig(coef=0.1), *(KLConfig(coef=0.1, estimator=e) for e in ("k1", "abs", "k2"))]
    assert len({round(loss(bench, AlgorithmConfig(kl=config)), 9) for config in in_loss}) == len(in_loss)
    on_reward = AlgorithmConfig(kl=KLConfig(coef=0.1, placement="reward"))
    assert loss(bench, on_reward) == loss(bench, AlgorithmConfig()), "the penalty is on the reward alone"
    with process_group():
        worker = TrainerWorker(0, 1)
        worker._engine, batch = engine(bench), random_batch()
        batch.batch["rollout_logprobs"] = batch.batch["old_logprobs"]
        worker._updates = [batch]
        k1, k2 = (np.concatenate(worker.forward(reference_kl=e).kl_sums or []) for e in ("k1", "k2"))
    assert not np.allclose(k1, k2)
    equal = mismatch_sums(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool))
    trainer = Actors({"forward": lambda **_: [ForwardSummary([], [equal])]})
    options = ["algorithm.kl.coef=0.1", "algorithm.kl.placement=reward", "algorithm.kl.estimator=k2"]
    with bench.job(*options, trainer=trainer) as job:
        job._rows = [[]]
        job.old_logprobs()
    assert trainer.given("forward") == [((), {"reference_kl": "k2"})]
    roles = [{a.role for a in plan(bench.config(f"algorithm.kl.coef={c}"), gpus=0, cores=2).actors} for c in (0.0, 0.1)]
    assert "reference" in roles[1] - roles[0]


@entry("rollout.mismatch_alarm")
def mismatch_alarm(bench: Bench) -> None:
    def alarms(limit: float) -> int:
        with bench.job(f"rollout.mismatch_alarm={limit}") as job:
            job.begin_step()
            job._metrics["mismatch/logprob_abs_mean"] = 0.1
            job._unwritten = (make_experience([[2, 2]]), np.zeros(2))
            job.end_step()
            events = job.observers.folder.path / "events.jsonl"
            return events.read_text(encoding="utf-8").count('"alert"') if events.exists() else 0

    assert [alarms(limit) for limit in (0.05, 0.5)] == [1, 0]
