"""The loss's channels: the objective that a configuration describes, on the real engine and a batch that all of them
find something in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from composing import run_config, with_leaves
from model_folders import make_model_folder
from training_batches import composed_batch, process_group

from knobs.table import Bench, entry
from knobs.training import TRAINER
from rlsys.algorithms.requirements import needs_teacher, objective, step_weights
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import ModelConfig, RunConfig
from rlsys.engines.train.fsdp import FsdpEngine

# Two updates: π_old is then a column, and ratios differ from 1.
COMPOSED: dict[str, Any] = {
    "algorithm.distillation.weight": 0.5,
    "algorithm.preference.weight": 0.7,
    "trainer.updates_per_step": 2,
}
CHANNELS = {
    "policy": "algorithm",
    "distillation": "algorithm.distillation",
    "preference": "algorithm.preference",
}


@cache
def quick_start() -> RunConfig:
    return run_config()


def described(changes: Mapping[str, Any]) -> RunConfig:
    return with_leaves(quick_start(), COMPOSED | dict(changes))


def full_batch() -> DataProto:
    """Every column that any channel reads."""
    batch = composed_batch()
    generator = torch.Generator().manual_seed(7)
    columns = batch.batch
    lengths = jagged.lengths(columns["response_ids"])
    mask = jagged.values(columns["response_mask"])
    old = jagged.values(columns["old_logprobs"])
    for name, values in {
        "rollout_logprobs": (old + 0.3 * torch.randn(len(mask), generator=generator)) * mask,
        "old_entropy": 2 * torch.rand(len(mask), generator=generator),
        "functional_mask": torch.rand(len(mask), generator=generator) < 0.5,
    }.items():
        columns[name] = jagged.from_values(values, lengths)
    return batch


BATCH = full_batch()


def load(bench: Bench, config: RunConfig) -> FsdpEngine:
    return FsdpEngine.load(
        ModelConfig(path=str(bench.model)),
        TRAINER,
        temperature=1.0,
        total_steps=4,
        seed=0,
        distillation=config.algorithm.distillation if needs_teacher(config) else None,
    )


def metrics(engine: FsdpEngine, config: RunConfig, step: int = 1) -> dict[str, float]:
    return engine.forward_backward(BATCH, objective(config).at(step_weights(config, step)))


def measured(bench: Bench, *changes: Mapping[str, Any], step: int = 1) -> list[dict[str, float]]:
    """What the objective of each configuration gives before any step, on one engine whose teacher is the policy."""
    with process_group():
        engine = load(bench, described({}))
        return [metrics(engine, described(change), step) for change in changes]


def assert_all_differ(bench: Bench, name: str, *changes: Mapping[str, Any]) -> None:
    values = [round(found[name], 9) for found in measured(bench, *changes)]
    assert len(set(values)) == len(changes), values


def _weight_and_schedule(channel: str, key: str) -> None:
    @entry(f"{key}.weight", f"{key}.schedule")
    def check(bench: Bench) -> None:
        one, two, off, half = measured(
            bench,
            {f"{key}.weight": 1.0},
            {f"{key}.weight": 2.0},
            {f"{key}.weight": 0.0},
            {f"{key}.weight": 1.0, f"{key}.schedule": [[1.0, 0.0], [3.0, 1.0]]},
            step=2,
        )
        part = one[f"{channel}/loss"]
        assert abs(part) > 1e-3
        assert two["loss"] - one["loss"] == pytest.approx(part, rel=1e-4)
        assert one["loss"] - off["loss"] == pytest.approx(part, rel=1e-4)
        assert f"{channel}/loss" not in off
        assert one["loss"] - half["loss"] == pytest.approx(part / 2, rel=1e-4)


for _channel, _key in CHANNELS.items():
    _weight_and_schedule(_channel, _key)


# --- the policy gradient ---


@entry("algorithm.entropy_quantile", "algorithm.functional_tokens", "algorithm.correction")
def token_choices(bench: Bench) -> None:
    plain, quantile, functional, capped, lower = measured(
        bench,
        {},
        {"algorithm.entropy_quantile": 0.5},
        {"algorithm.functional_tokens": r"\d"},
        {"algorithm.correction": {"tis_token": {}}},
        {"algorithm.correction": {"tis_token": {"cap": 1.0}}},
    )
    assert len({found["policy/loss"] for found in (plain, quantile, functional, capped, lower)}) == 5
    assert quantile["policy/entropy_kept"] == pytest.approx(0.5, abs=0.02)
    columns = {name: jagged.values(BATCH.batch[name]) for name in ("response_mask", "functional_mask")}
    assert functional["policy/tokens"] == int((columns["response_mask"] & columns["functional_mask"]).sum())


@entry("algorithm.kl.corrected")
def kl_corrected(bench: Bench) -> None:
    plain, corrected = measured(
        bench, {"algorithm.kl.coef": 0.1}, {"algorithm.kl.coef": 0.1, "algorithm.kl.corrected": True}
    )
    assert plain["policy/kl"] != corrected["policy/kl"]
    assert plain["policy/loss"] != corrected["policy/loss"]


# --- self-distillation ---


@entry(
    "algorithm.distillation.divergence",
    "algorithm.distillation.divergence_options",
    "algorithm.distillation.top_k",
    "algorithm.distillation.tail",
    "algorithm.distillation.ratio_cap",
    "algorithm.distillation.aggregation",
)
def distillation(bench: Bench) -> None:
    key = "algorithm.distillation"
    assert_all_differ(
        bench,
        "distillation/loss",
        {},
        {f"{key}.divergence": "forward_kl"},
        {f"{key}.divergence": "knobs.plugins.squared_gap"},
        {f"{key}.divergence_options": {"alpha": 0.2}},
        {f"{key}.top_k": 5},
        {f"{key}.top_k": 5, f"{key}.tail": False},
        {f"{key}.ratio_cap": 0.5},
        {f"{key}.ratio_cap": None},
        {f"{key}.aggregation": "seq-mean-token-mean"},
    )


@entry("algorithm.distillation.hybrid")
def hybrid(bench: Bench) -> None:
    alone, half, teacher = measured(bench, *({"algorithm.distillation.hybrid": value} for value in (None, 0.5, 0.0)))
    assert len({found["policy/loss"] for found in (alone, half, teacher)}) == 3
    assert alone["distillation/loss"] == pytest.approx(half["distillation/loss"]), "the other channel is as it was"


def taught(bench: Bench, **changes: Any) -> float:
    """The divergence from a teacher of this kind, after a step that moved the policy."""
    config = described({f"algorithm.distillation.{name}": value for name, value in changes.items()})
    with process_group():
        engine = load(bench, config)
        metrics(engine, config)
        engine.optim_step()
        return metrics(engine, config)["distillation/divergence"]


@entry(
    "algorithm.distillation.teacher",
    "algorithm.distillation.teacher_rate",
    "algorithm.distillation.teacher_mix",
    "algorithm.distillation.teacher_path",
)
def teacher(bench: Bench) -> None:
    other = make_model_folder(bench.tmp / "other", seed=9, hidden=96)
    found = {
        "self": taught(bench),
        "frozen": taught(bench, teacher="frozen"),
        "ema": taught(bench, teacher="ema", teacher_rate=0.25),
        "faster ema": taught(bench, teacher="ema", teacher_rate=0.75),
        "trust region": taught(bench, teacher="trust_region", teacher_mix=0.25),
        "nearer": taught(bench, teacher="trust_region", teacher_mix=0.75),
        "model": taught(bench, teacher="model", teacher_path=str(bench.model)),
        "other model": taught(bench, teacher="model", teacher_path=str(other)),
    }
    assert found["model"] == found["frozen"], "the same weights"
    del found["model"]
    assert len(set(found.values())) == 7, found


# --- preferences ---


@entry("algorithm.preference.loss", "algorithm.preference.loss_options")
def preference(bench: Bench) -> None:
    key = "algorithm.preference"
    assert_all_differ(
        bench,
        "preference/loss",
        {},
        {f"{key}.loss": "ipo"},
        {f"{key}.loss": "simpo"},
        {f"{key}.loss": "knobs.plugins.hinge"},
        {f"{key}.loss_options": {"beta": 0.5}},
    )
