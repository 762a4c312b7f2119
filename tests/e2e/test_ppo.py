"""PPO with a critic: its group of actors learns values, its state is part of the checkpoint, and it may learn first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import make_model_folder
from one_process import Run, one_process
from running import comparable, died_after, job_process, only_run, read_jsonl, steps_of, tensors_below
from safetensors.torch import load_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS, WARMUP = 8, 2
OVERRIDES = (
    f"steps={STEPS}",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "eval.every=0",
    "trainer.lr=1e-4",
    "trainer.critic.lr=1e-2",
    "trainer.critic.value_clip=0.2",
    f"trainer.critic.warmup_steps={WARMUP}",
    "checkpoint.every=1",
    "checkpoint.keep_last=99",
    "tracker.rollouts=64",
)


@pytest.fixture(scope="module")
def run(ray_cluster: None) -> Iterator[Run]:
    with one_process() as run:
        yield run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def whole(run: Run, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert run(root, *OVERRIDES, f"model.path={model}", recipe="ppo_qwen") == 0
    return only_run(root)


def checkpoint(folder: Path, step: int) -> dict[str, bytes]:
    return tensors_below(folder / "checkpoints" / f"step-{step:08d}")


def check_learning(folder: Path) -> None:
    steps = steps_of(folder)
    for line in steps:
        for name in ("loss", "error", "prediction", "return", "grad_norm", "target_variance"):
            assert math.isfinite(line[f"critic/{name}"]), name
        assert math.isfinite(line["advantage/std"])
        assert line["critic/live_fraction"] == 1
    # the policy moves little, so what there is to predict stays much the same
    first, last = ([line["critic/error"] for line in part] for part in (steps[:2], steps[-2:]))
    assert sum(last) < 0.7 * sum(first)
    for step in range(1, STEPS + 1):
        rows = read_jsonl(folder / "rollouts" / f"step-{step:06d}.jsonl")
        assert all(math.isfinite(row["advantage"]) for row in rows)


def test_the_critic_learns_values(whole: Path) -> None:
    check_learning(whole)


def test_while_the_critic_warms_up_the_policy_stays_as_it_was(whole: Path, model: Path) -> None:
    policy = "model-00001-of-00001.safetensors"
    weights = load_file(model / "model.safetensors")
    for step in range(1, WARMUP + 1):
        assert steps_of(whole)[step - 1].get("policy/loss") is None
        found = load_file(whole / "checkpoints" / f"step-{step:08d}" / policy)
        assert all((found[name] == weight.flatten()).all() for name, weight in weights.items())
    assert checkpoint(whole, WARMUP)[policy] != checkpoint(whole, WARMUP + 1)[policy]
    assert checkpoint(whole, 1)[f"critic/{policy}"] != checkpoint(whole, 2)[f"critic/{policy}"]
    assert math.isfinite(steps_of(whole)[WARMUP]["policy/loss"])


def test_the_policys_schedule_spans_the_steps_in_which_it_learns(whole: Path) -> None:
    """It falls in a straight line to 0, over two updates a step."""
    updates = 2 * (STEPS - WARMUP)
    shown = [line["train/lr"] for line in steps_of(whole)[WARMUP:]]
    assert shown == pytest.approx([1e-4 * (updates - 2 * i - 0.5) / updates for i in range(STEPS - WARMUP)])


def test_the_critic_counts_the_tokens_that_it_values(whole: Path) -> None:
    for line in steps_of(whole):
        assert line["critic/tokens"] == line["rollout/tokens"]


def test_a_checkpoint_holds_the_critic_and_a_run_that_died_goes_on_bit_for_bit(
    run: Run, whole: Path, model: Path, tmp_path: Path
) -> None:
    names = checkpoint(whole, STEPS)
    assert {"critic/model-00001-of-00001.safetensors", "critic/optimizer-00001-of-00001.safetensors"} <= names.keys()
    folder = died_after(WARMUP + 1, whole, tmp_path)
    resume = f"resume={folder}"
    assert run(tmp_path, *OVERRIDES, f"model.path={model}", resume, recipe="ppo_qwen") == 0
    assert comparable(folder) == comparable(whole)
    assert tensors_below(folder) == tensors_below(whole)


@pytest.mark.slow
def test_a_critic_of_two_ranks_learns_and_goes_on_bit_for_bit(model: Path, tmp_path: Path) -> None:
    overrides = (*OVERRIDES, f"model.path={model}", "rollout=torch", "trainer.ranks=2")
    with job_process() as run_job:
        assert run_job(tmp_path / "whole", *overrides, recipe="ppo_qwen") == 0
        whole = only_run(tmp_path / "whole")
        check_learning(whole)
        assert "critic/model-00002-of-00002.safetensors" in checkpoint(whole, STEPS)
        folder = died_after(WARMUP + 1, whole, tmp_path / "died")
        assert run_job(tmp_path / "died", *overrides, f"resume={folder}", recipe="ppo_qwen") == 0
    assert comparable(folder) == comparable(whole)
    assert tensors_below(folder) == tensors_below(whole)
