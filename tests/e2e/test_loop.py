"""The loop with every family of models and every branch that a step can take, on tiny random models."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from model_folders import Family, make_model_folder
from running import RunJob, job_process, launch, only_run, read_jsonl, steps_of, write_jsonl

from rlsys.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TINY = (
    "steps=2",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "eval.every=0",
    "trainer.lr=1e-2",
)


class Case(NamedTuple):
    """One family and head, together with one of the branches of a step."""

    name: str
    family: Family
    tied: bool
    overrides: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


CASES = [
    Case("qwen2-tied, small micro-batches", "qwen2", True, ("trainer.micro_batch_tokens=64",)),
    Case("qwen2-untied, KL in the loss", "qwen2", False, ("algorithm.kl.coef=0.1",), ("policy/kl",)),
    Case(
        "qwen3-tied, old log-probs from the sampler",
        "qwen3",
        True,
        ("algorithm.old_logprobs=sampler", "trainer.updates_per_step=2"),
    ),
    Case(
        "qwen3-untied, KL in the reward, two ranks, samplers and updates",
        "qwen3",
        False,
        (
            "algorithm.kl.coef=0.1",
            "algorithm.kl.placement=reward",
            "trainer.ranks=2",
            "rollout.workers=2",
            "trainer.updates_per_step=2",
        ),
        ("policy/kl_ref",),
    ),
    Case("llama-untied, temperature 0.7", "llama", False, ("rollout.temperature=0.7",)),
]


@pytest.fixture(scope="module")
def run_job() -> Iterator[RunJob]:
    with job_process() as run:
        yield run


def check_steps(root: Path, *metrics: str) -> None:
    steps = steps_of(only_run(root))
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["mismatch/logprob_abs_mean"] <= 1e-4
        for name in ("policy/loss", "policy/entropy", "train/grad_norm", "advantage/groups", *metrics):
            assert math.isfinite(line[name]), name
        assert line["rollout/samples"] == 16
    assert steps[0]["train/grad_norm"] > 0
    assert (only_run(root) / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_trains_and_the_sampler_agrees_with_the_trainer(
    case: Case, run_job: RunJob, tmp_path: Path
) -> None:
    model = make_model_folder(tmp_path / "model", case.family, tied=case.tied)
    use_digits = "reward.parts.correct.use=rewards_for_runs.digits"
    assert run_job(tmp_path, "rollout=torch", *TINY, f"model.path={model}", use_digits, *case.overrides) == 0
    check_steps(tmp_path, *case.metrics)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_family_trains_on_what_vllm_samples(family: Family, tied: bool, run_job: RunJob, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", family, tied=tied)
    use_digits = "reward.parts.correct.use=rewards_for_runs.digits"
    assert run_job(tmp_path, "rollout.kv_cache_gib=0.1", *TINY, f"model.path={model}", use_digits) == 0
    check_steps(tmp_path)


@pytest.mark.slow
def test_a_step_on_the_prompts_of_gsm8k(run_job: RunJob, gsm8k_folder: Path, tmp_path: Path) -> None:
    """llama-tied: with the others, every family and head has been through the loop."""
    model = make_model_folder(tmp_path / "model", "llama", tied=True, max_length=2048)
    overrides = ("data=gsm8k", f"data.path={gsm8k_folder}", "data.max_prompt_tokens=1500", "data.max_response_tokens=8")
    done = run_job(
        tmp_path, "rollout=torch", *TINY, "steps=1", f"model.path={model}", *overrides, "data.long_prompts=drop"
    )
    assert done == 0
    (step,) = steps_of(only_run(tmp_path))
    assert step["mismatch/logprob_abs_mean"] <= 1e-4
    row = read_jsonl(only_run(tmp_path) / "rollouts" / "step-000001.jsonl")[0]
    assert "####" in row["prompt"]
    assert row["answer"].lstrip("-").replace(".", "").isdigit()


def prompts_file(path: Path, prompts: list[str]) -> Path:
    return write_jsonl(path, [{"prompt": prompt, "answer": "4"} for prompt in prompts])


FROM_FILE = (
    "data=file",
    "data.shuffle=false",
    "data.max_prompt_tokens=32",
    "data.max_response_tokens=8",
)


@pytest.mark.slow
def test_a_sampler_that_does_not_answer_ends_the_run_at_its_last_whole_step(run_job: RunJob, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    rows = prompts_file(tmp_path / "rows.jsonl", ["one", "two", "three", "four", "five", "six", "stuck", "seven"])
    done = run_job(
        tmp_path,
        "rollout=torch",
        *TINY,
        *FROM_FILE,
        f"data.path={rows}",
        f"model.path={model}",
        "rollout.environment=plugins_for_runs.Stuck",
        "deadlines.rollout=8",
        "health.restarts=0",
    )
    assert done == 1
    folder = only_run(tmp_path)
    said = next(event["text"] for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "end")
    for words in ("within 8 s", "phase 'rollout'", "rollout worker 0 (16 responses)", "deadlines.rollout"):
        assert words in said
    assert CheckpointStore(folder / "checkpoints", 1, False).latest().step == 1  # type: ignore[union-attr]


MY_REWARD = """
def picky(response, task):
    if task["prompt"] == "bad":
        raise ValueError("cannot score this")
    return float(len(response)) / 8
"""


@pytest.mark.slow
def test_a_reward_that_raises_is_recorded_until_it_does_too_often(tmp_path: Path) -> None:
    """The reward comes by import path from a file in the folder where the command is run."""
    model = make_model_folder(tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(MY_REWARD)
    rows = prompts_file(tmp_path / "rows.jsonl", ["one", "two", "three", "bad", "bad", "bad", "five", "six"])
    done = launch(
        "rollout=torch",
        *TINY,
        *FROM_FILE,
        f"data.path={rows}",
        f"model.path={model}",
        "reward.parts.correct.use=my_rewards.picky",
        "reward.max_failure_rate=0.25",
        cwd=tmp_path,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"[5-8] of 16 samples \(\d+\.\d%\) have no reward", said), said  # it stops once it is too many
    assert "reward.max_failure_rate" in said
    assert "cannot score this" in said
    assert "Traceback" not in done.stdout + done.stderr
    folder = only_run(tmp_path)
    assert [(line["step"], line["failures/reward"]) for line in steps_of(folder)] == [(1, 4.0)]
    failures = read_jsonl(folder / "failures.jsonl")
    assert [row["step"] for row in failures].count(1) == 4
    assert {row["step"] for row in failures} == {1, 2}
    assert {(row["prompt"], row["part"], row["error"]) for row in failures} == {("bad", "correct", "raised")}
    assert CheckpointStore(folder / "checkpoints", 1, False).latest().step == 1  # type: ignore[union-attr]
