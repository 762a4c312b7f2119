"""What a step can do to its batch and its loss, in whole runs of a step or two: filters with refill, greedy baselines,
restrictions to some tokens, corrections."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import EOS, make_model_folder, make_tokenizer
from one_process import Run, one_process
from rewards_for_runs import digits
from running import only_run, read_jsonl, steps_of, write_jsonl
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

GROUPS, SAMPLES, RESPONSE = 4, 4, 8
TINY = (
    "steps=1",
    f"data.prompts_per_step={GROUPS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "eval.every=0",
    "trainer.lr=1e-2",
    "checkpoint.export=false",
    "tracker.rollouts=64",
)


@pytest.fixture(scope="module")
def run(ray_cluster: None) -> Iterator[Run]:
    with one_process() as run:
        yield run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "model")


def rollouts(root: Path, step: int = 1) -> list[dict[str, Any]]:
    return read_jsonl(only_run(root) / "rollouts" / f"step-{step:06d}.jsonl")


def by_group(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {uid: list(group) for uid, group in groupby(rows, key=lambda row: row["uid"])}


# Every response to "flat" earns 0: such a group has no signal.
PROMPTS = ["flat", "a", "flat", "b", "flat", "c", "d", "e", "f", "g", "h", "flat"]


def filtered(root: Path, prompts: list[str] = PROMPTS) -> tuple[str, ...]:
    rows = write_jsonl(root / "rows.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in prompts])
    return (
        "data=file",
        f"data.path={rows}",
        "data.shuffle=false",
        "data.max_prompt_tokens=16",
        f"data.max_response_tokens={RESPONSE}",
        "reward.parts.correct.use=rewards_for_runs.spiky_digits",
    )


def test_groups_without_signal_are_replaced_until_the_batch_has_its_size(run: Run, model: Path, tmp_path: Path) -> None:
    """First step: flat a flat b, then flat c, then d. Second: e f g h."""
    overrides = (*TINY, *filtered(tmp_path), "steps=2", f"model.path={model}")
    assert run(tmp_path, *overrides, recipe="dapo_qwen") == 0
    first, second = steps_of(only_run(tmp_path))
    assert {name: first[f"filter/{name}"] for name in ("rounds", "groups", "generated", "zero_variance_dropped")} == {
        "rounds": 2,
        "groups": GROUPS,
        "generated": 7 * SAMPLES,
        "zero_variance_dropped": 3,
    }
    assert (first["rollout/samples"], second["rollout/samples"]) == (7 * SAMPLES, GROUPS * SAMPLES)  # dropped ones too
    assert (second["filter/rounds"], second["filter/generated"]) == (0, GROUPS * SAMPLES)
    assert first["advantage/groups_without_signal"] == 0
    assert 0 < first["policy/tokens"] < first["rollout/tokens"]
    assert second["policy/tokens"] == second["rollout/tokens"]  # of both updates, and of no dropped group
    recorded = by_group(rollouts(tmp_path))
    assert [group[0]["prompt"] for group in recorded.values()] == PROMPTS[:4]
    for group in recorded.values():
        dropped = group[0]["prompt"] == "flat"
        assert [row["advantage"] is None for row in group] == [dropped] * SAMPLES
    assert [group[0]["prompt"] for group in by_group(rollouts(tmp_path, 2)).values()] == ["e", "f", "g", "h"]


def test_out_of_refills_a_step_goes_on_with_fewer_groups(run: Run, model: Path, tmp_path: Path) -> None:
    overrides = (*TINY, *filtered(tmp_path), f"model.path={model}", "algorithm.max_refills=1")
    assert run(tmp_path, *overrides, recipe="dapo_qwen") == 0
    (step,) = steps_of(only_run(tmp_path))
    assert (step["filter/rounds"], step["filter/groups"], step["filter/generated"]) == (1, 3, 6 * SAMPLES)
    assert step["rollout/samples"] == step["filter/generated"]


@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_groups_than_updates_are_a_small_step_and_no_error(
    kept: int, run: Run, model: Path, tmp_path: Path
) -> None:
    """Where no group has signal the step is trained on as it was sampled: every advantage is 0."""
    prompts = ["a"] * kept + ["flat"] * (GROUPS - kept)
    overrides = (*TINY, *filtered(tmp_path, prompts), f"model.path={model}", "algorithm.max_refills=0")
    assert run(tmp_path, *overrides, recipe="dapo_qwen") == 0
    (step,) = steps_of(only_run(tmp_path))
    assert step["filter/groups"] == kept
    assert step["rollout/samples"] == GROUPS * SAMPLES
    assert (step["policy/tokens"] == step["rollout/tokens"]) is (kept == 0)
    assert (step["train/grad_norm"] > 0) is (kept > 0)
    assert step["train/skipped"] == 0


def greedy_reward(model: Path, prompt_ids: list[int]) -> float:
    """Of transformers' own greedy response."""
    with torch.no_grad():
        out = AutoModelForCausalLM.from_pretrained(model).generate(
            torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=RESPONSE, eos_token_id=EOS, pad_token_id=0
        )
    return digits(make_tokenizer().decode(out[0, len(prompt_ids) :], skip_special_tokens=True), {})


def test_remax_compares_with_the_greedy_response_to_the_same_prompt(run: Run, model: Path, tmp_path: Path) -> None:
    assert run(tmp_path, *TINY, f"model.path={model}", "algorithm.advantage=remax") == 0
    for group in by_group(rollouts(tmp_path)).values():
        baseline = greedy_reward(model, group[0]["prompt_ids"])
        for row in group:
            assert row["advantage"] == pytest.approx(row["reward"] - baseline, abs=1e-6)


def test_with_the_samplers_log_probs_as_pi_old_later_updates_clip(run: Run, model: Path, tmp_path: Path) -> None:
    overrides = ("algorithm.old_logprobs=sampler", "trainer.updates_per_step=2", "algorithm.loss_options.clip_high=0.1")
    assert run(tmp_path, *TINY, f"model.path={model}", *overrides) == 0
    (step,) = steps_of(only_run(tmp_path))
    assert 0 < step["policy/clip_fraction"] < 1
    assert step["policy/ratio_max"] > 1.1
    assert step["mismatch/logprob_abs_mean"] <= 1e-4  # of the first update
    assert "time/old_logprobs_s" not in step


def test_only_functional_tokens_earn_a_gradient(run: Run, model: Path, tmp_path: Path) -> None:
    """A token is a character, so that the text says how many there are."""
    assert run(tmp_path, *TINY, f"model.path={model}", "algorithm.functional_tokens='[0-9]+'") == 0
    (step,) = steps_of(only_run(tmp_path))
    counts = [sum(character.isdigit() for character in row["response"]) for row in rollouts(tmp_path)]
    assert step["policy/tokens"] == sum(counts)
    assert step["policy/live_fraction"] == sum(count > 0 for count in counts) / len(counts)
    assert 0 < sum(counts) < step["rollout/tokens"]


def test_only_the_most_uncertain_tokens_earn_a_gradient(run: Run, model: Path, tmp_path: Path) -> None:
    assert run(tmp_path, *TINY, f"model.path={model}", "algorithm.entropy_quantile=0.8") == 0
    (step,) = steps_of(only_run(tmp_path))
    assert step["policy/entropy_kept"] == pytest.approx(0.2, abs=1.5 / step["rollout/tokens"])


def test_a_correction_weighs_by_what_sampler_and_trainer_differ(run: Run, model: Path, tmp_path: Path) -> None:
    correction = "+algorithm.correction={tis_token: {cap: 2.0}, veto: {}}"
    assert run(tmp_path, *TINY, f"model.path={model}", correction) == 0
    (step,) = steps_of(only_run(tmp_path))
    assert step["policy/correction_dropped"] == 0
    assert step["policy/correction_tis_token_weight"] == pytest.approx(1, abs=1e-4)
    assert step["policy/correction_tis_token_weight"] != 1
    assert step["policy/correction_tis_token_capped"] == 0
    assert step["policy/correction_veto_rows_kept"] == 1
