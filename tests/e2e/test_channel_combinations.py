"""Channels, teachers, estimators and sources of pairs in combination: whole runs of two steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import make_model_folder
from one_process import Run, one_process
from running import only_run, steps_of, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TINY = (
    "steps=2",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "hints.threshold=0.5",
    "hints.max_tokens=64",
    "eval.every=0",
    "trainer.lr=1e-2",
    "checkpoint.export=false",
)
UPDATES = "trainer.updates_per_step=2"
PAIRS = ("replay.source=file", "replay.pairs_per_step=3", "replay.path={root}/pairs.jsonl")
TEACHER, KL = "algorithm.distillation.teacher", "algorithm.kl"

# By name: overrides, and metrics that say that the part took effect.
COMBINATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trust region over the likeliest words": (
        (f"{TEACHER}=trust_region", "algorithm.distillation.top_k=8", UPDATES),
        ("distillation/ratio_capped",),
    ),
    "hybrid advantages from the first policy": (
        (f"{TEACHER}=frozen", "algorithm.distillation.hybrid=0.5", "algorithm.loss=dapo"),
        ("distillation/teacher_advantage", "policy/hybrid/live_fraction"),
    ),
    "no reference, and each channel's gradient": (
        ("algorithm.preference.loss=simpo", "guards.channel_gradients=true"),
        ("policy/grad_norm", "distillation/grad_norm", "preference/grad_norm"),
    ),
    "a teacher of its own": (
        (f"{TEACHER}=model", "algorithm.distillation.teacher_path={root}/teacher"),
        ("distillation/teacher_entropy",),
    ),
    "a critic beside pairs of a file": (
        ("algorithm.advantage=gae", UPDATES, *PAIRS),
        ("critic/error", "preference/margin"),
    ),
    "a penalty on every token beside pairs of a file": (
        ("algorithm.advantage=reinforce_plus_plus", f"{KL}.coef=0.1", f"{KL}.placement=reward", *PAIRS),
        ("policy/kl_ref", "preference/margin"),
    ),
    "statistics of the whole batch beside pairs of a file": (
        ("algorithm.loss=clip_cov", f"{KL}.coef=0.1", "algorithm.entropy_quantile=0.5", *PAIRS),
        ("policy/kl", "policy/entropy_kept"),
    ),
    "self-distillation and pairs alone": (
        ("algorithm.weight=0.0", f"{TEACHER}=self", "algorithm.distillation.divergence=reverse_kl"),
        ("distillation/divergence", "mismatch/logprob_abs_mean", "policy/entropy"),
    ),
}


@pytest.fixture(scope="module")
def run(ray_cluster: None) -> Iterator[Run]:
    with one_process() as run:
        yield run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, another model as wide as it likes, and pairs."""
    root = tmp_path_factory.mktemp("inputs")
    make_model_folder(root / "model", max_length=256)
    make_model_folder(root / "teacher", "llama", seed=3, hidden=96, max_length=256)
    pairs = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": "abc"} for i in range(5)]
    write_jsonl(root / "pairs.jsonl", pairs)
    return root


# Those in which actors, pairs and token-level estimators meet; the others differ in the channels' maths alone.
MEETING = ("no reference, and each channel's gradient", *(name for name in COMBINATIONS if "pairs of a file" in name))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in MEETING else pytest.mark.slow) for name in COMBINATIONS]
)
def test_a_combination_trains(name: str, run: Run, inputs: Path, tmp_path: Path) -> None:
    overrides, metrics = COMBINATIONS[name]
    filled = [override.format(root=inputs) for override in overrides]
    assert run(tmp_path, *TINY, f"model.path={inputs / 'model'}", *filled, recipe="composer_qwen") == 0
    for line in steps_of(only_run(tmp_path)):
        for metric in ("train/loss", "train/grad_norm", "distillation/loss", "preference/loss", *metrics):
            assert math.isfinite(line[metric]), metric
        assert line["train/grad_norm"] > 0
        assert line["train/skipped"] == 0
        assert line["mismatch/logprob_abs_mean"] <= 1e-4
        assert line["preference/pairs"] == (3 if "replay.source=file" in overrides else 4)


def test_a_channel_begins_when_its_schedule_says(run: Run, inputs: Path, tmp_path: Path) -> None:
    schedule = "algorithm.distillation.schedule=[[1, 0.0], [3, 1.0]]"
    overrides = (*TINY, "steps=3", f"model.path={inputs / 'model'}", schedule, "guards.dead_steps=1")
    assert run(tmp_path, *overrides, recipe="composer_qwen") == 0
    weights = [line.get("distillation/weight") for line in steps_of(only_run(tmp_path))]
    assert weights == [None, 0.05, 0.1]
