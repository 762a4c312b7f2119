"""ZeRO-3 on one rank beside FSDP2: every kind of objective, teacher and model; what it skips and what it refuses."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model_folder
from training_batches import composed_batch, process_group, random_batch, whole

from rlsys.algorithms.channels import CrossEntropy, Distillation, PolicyGradient, Preference
from rlsys.algorithms.channels.value import ValueLoss
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine
from rlsys.engines.train.engine import ShardedEngine

TRAINER = TrainerConfig(lr=1e-2, micro_batch_tokens=200)
POLICY = Objective({"policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0)})
COMPOSED = Objective(
    {
        "imitation": (CrossEntropy(), 1.0),
        "distillation": (Distillation(DivergencePass("jsd"), old_logprobs="self"), 0.5),
        "preference": (Preference("dpo"), 0.7),
    }
)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_model_folder(root / "policy"), make_model_folder(root / "other", seed=9, hidden=96)


def pair(folder: Path, dtype: str = "float32", trainer: TrainerConfig = TRAINER, **options: Any) -> list[ShardedEngine]:
    """The same engine of each back end."""
    model = ModelConfig(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    return [
        load_engine(model, replace(trainer, backend=name), temperature=0.7, total_steps=20, seed=0, **options)  # type: ignore[misc]
        for name in ("fsdp", "zero3")
    ]


def assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


def assert_trains_alike(engines: list[ShardedEngine], batch: DataProto, objective: Objective, **options: Any) -> None:
    """Two steps: the second one sees what the first did to weights, moments and teacher."""
    for _ in range(2):
        theirs, ours = (engine.forward_backward(batch, objective, **options) for engine in engines)
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        assert_alike(*(whole(engine._trained.gradient()) for engine in engines), tolerance=1e-5)
        assert engines[1].optim_step() == pytest.approx(engines[0].optim_step(), rel=1e-5)
    assert_alike(*(dict(engine.export_weights(torch.float32)) for engine in engines), tolerance=1e-4)


@pytest.mark.parametrize("teacher", ["ema", "trust_region", "model"])
def test_with_every_teacher(folders: tuple[Path, Path], teacher: str) -> None:
    config = DistillationConfig(weight=0.5, teacher=teacher, teacher_path=str(folders[1]))  # type: ignore[arg-type]
    assert_trains_alike(pair(folders[0], distillation=config), composed_batch(seed=5), COMPOSED)


def test_the_norm_of_each_channel_s_gradient(folders: tuple[Path, Path]) -> None:
    engines = pair(folders[0], distillation=DistillationConfig(weight=0.5))
    assert_trains_alike(engines, composed_batch(seed=5), COMPOSED, channel_gradients=True)


def test_a_critic(folders: tuple[Path, Path]) -> None:
    batch = random_batch()
    column = batch.batch["old_logprobs"]
    for name in ("values", "returns"):
        batch.batch[name] = jagged.from_values(torch.randn_like(jagged.values(column)), jagged.lengths(column))
    engines = pair(folders[0], critic=True)
    assert_trains_alike(engines, batch, Objective({"critic": (ValueLoss(), 1.0)}))
    theirs, ours = (jagged.values(engine.forward(batch).batch["values"]) for engine in engines)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"activations": "recompute"}, {"rows": "padded"}, {"offload": "all"}])
def test_what_saves_memory_changes_nothing(folders: tuple[Path, Path], options: dict[str, Any]) -> None:
    (plain, _), (_, saving) = pair(folders[0]), pair(folders[0], trainer=replace(TRAINER, **options))
    batch = random_batch()
    assert saving.forward_backward(batch, POLICY)["loss"] == pytest.approx(
        plain.forward_backward(batch, POLICY)["loss"]
    )
    assert_alike(whole(saving._trained.gradient()), whole(plain._trained.gradient()), tolerance=1e-5)


def test_fsdp_offloads_all_and_changes_nothing(folders: tuple[Path, Path]) -> None:
    engines = [pair(folders[0], trainer=replace(TRAINER, offload=value))[0] for value in ("none", "all")]
    assert_trains_alike(engines, random_batch(), POLICY)


def test_bfloat16_forward_keeps_float32_weights_and_gradients(folders: tuple[Path, Path]) -> None:
    theirs, ours = pair(folders[0], "bfloat16", distillation=DistillationConfig(weight=0.5, teacher="ema"))
    batch = composed_batch(seed=5)
    expected, metrics = (engine.forward_backward(batch, COMPOSED) for engine in (theirs, ours))
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    gradients = ours._trained.gradient()
    assert {shard.local.dtype for shard in gradients.values()} == {torch.float32}
    assert_alike(whole(gradients), whole(theirs._trained.gradient()), tolerance=0.1)
    start = {name: weight.clone() for name, weight in ours.export_weights(torch.float32)}
    assert_alike(start, dict(theirs.export_weights(torch.float32)), tolerance=0)
    ours._trainer = replace(TRAINER, lr=1e-6)
    ours.optim_step()
    moved = dict(ours.export_weights(torch.float32))
    assert any(not torch.equal(moved[name], start[name]) for name in start)  # less than bfloat16 could tell
    assert ours._teacher is not None
    assert {shard.local.dtype for shard in ours._teacher.saved.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    taught = whole(ours._teacher.saved)[name] - start[name]
    assert taught.norm() == pytest.approx(0.05 * (moved[name] - start[name]).norm().item(), rel=0.1)


def test_an_update_that_is_not_finite_is_skipped(folders: tuple[Path, Path]) -> None:
    _, engine = pair(folders[0])
    before = {name: weight.clone() for name, weight in engine.export_weights(torch.float32)}
    broken = random_batch()
    jagged.values(broken.batch["advantages"]).fill_(torch.inf)
    engine.forward_backward(broken, POLICY)
    metrics = engine.optim_step()
    assert metrics["skipped"] == 1
    assert not math.isfinite(metrics["grad_norm"])
    assert_alike(dict(engine.export_weights(torch.float32)), before, tolerance=0)
    with pytest.raises(RuntimeError, match="forward_backward first"):
        engine.optim_step()
    sound = pair(folders[0])[0]
    for one in (engine, sound):  # nothing of it is left in the next one
        one.forward_backward(random_batch(), POLICY)
    assert_alike(whole(engine._trained.gradient()), whole(sound._trained.gradient()), tolerance=1e-5)


def test_no_rows_at_all(folders: tuple[Path, Path]) -> None:
    _, engine = pair(folders[0])
    nothing = DataProto.from_dict(tensors={})
    assert engine.forward_backward(nothing, POLICY)["loss"] == 0
    assert engine.optim_step()["grad_norm"] == 0


def test_a_missing_package_is_named_with_what_installs_it(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    with pytest.raises(UserError, match="not installed") as error:
        pair(folders[0])
    assert error.value.where == "trainer.backend"
    assert "rlsys[deepspeed]" in str(error.value)
