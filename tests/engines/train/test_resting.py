"""A rank that offloads between any two verbs trains to the same bits as one that does not. Run on a CPU, where the
engine itself would leave everything in place: what is moved, and how, does not depend on the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model_folder
from training_batches import composed_batch, process_group

from rlsys.algorithms.channels import Distillation, PolicyGradient
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.config.schema import DistillationConfig, LoraConfig, ModelConfig, TrainerConfig
from rlsys.engines.storages import storages
from rlsys.engines.train import load_engine
from rlsys.engines.train.resting import Resting, memory_of

OBJECTIVE = Objective(
    {
        "policy": (PolicyGradient(entropy_coef=0.01), 1.0),
        "distillation": (Distillation(DivergencePass("jsd"), old_logprobs="self"), 0.5),
    }
)
TEACHER = DistillationConfig(weight=0.5, teacher="ema", teacher_rate=0.3)
Between = Callable[[Any], None]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


def trained(folder: Path, backend: Any, between: Between, **model: Any) -> dict[str, torch.Tensor]:
    """Weights and moments after two steps and a look at rows. between: called between any two verbs."""
    engine: Any = load_engine(
        ModelConfig(path=str(folder), **model),
        TrainerConfig(lr=1e-2, micro_batch_tokens=200, backend=backend),
        temperature=0.7,
        total_steps=20,
        seed=0,
        distillation=replace(TEACHER, teacher="self" if "lora" in model else "ema"),
    )
    engine._resting = Resting("cpu")
    batch = composed_batch(rows=4)
    for _ in range(2):
        between(engine)
        engine.forward_backward(batch, OBJECTIVE)
        between(engine)  # with a gradient
        engine.optim_step()
        between(engine)
        engine.forward(batch)
    weights = {name: weight.clone() for name, weight in engine.export_weights(torch.float32)}
    moments = {name: shard.local.clone() for name, shard in engine._trained.moments().items()}
    return weights | moments | {f"teacher/{n}": s.local.clone() for n, s in engine._teacher.saved.items()}


def away_and_back(engine: Any) -> None:
    held = storages(memory_of(engine._trained), "cpu") + storages(engine._trained.optimizer_memory(), "cpu")
    assert engine.offload(weights=False) > 0 or not engine._trained.gradient()
    assert engine.offload() > 0
    assert engine.offload() == 0, "what is away stays"
    assert not any(storage.nbytes() for storage in held)
    engine.onload(optimizer=False)
    engine.onload()
    engine.onload()
    assert all(storage.nbytes() for storage in held)


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}, {"lora": LoraConfig(rank=4, quantize="nf4")}], ids=str)
def test_offloading_changes_no_bit(backend: str, model: dict[str, Any], tmp_path: Path) -> None:
    if backend == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = make_model_folder(tmp_path)
    plain = trained(folder, backend, lambda _: None, **model)
    moved = trained(folder, backend, away_and_back, **model)
    assert plain.keys() == moved.keys()
    assert any(name.startswith("teacher/") for name in plain) != ("lora" in model)
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


def test_on_a_cpu_nothing_is_moved(tmp_path: Path) -> None:
    engine: Any = load_engine(
        ModelConfig(path=str(make_model_folder(tmp_path))), TrainerConfig(), temperature=1.0, total_steps=1, seed=0
    )
    assert engine.offload() == 0
    engine.onload()
    assert all(storage.nbytes() for storage in storages(memory_of(engine._trained), "cpu"))
