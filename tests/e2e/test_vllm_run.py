"""The recipe as a user runs it, on vLLM: what a run leaves behind, and what it does not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from composing import run_config
from running import launch, only_run, processes_marked, read_jsonl, steps_of
from transformers import AutoModelForCausalLM

from rlsys.batch import jagged
from rlsys.checkpoint.store import CheckpointStore
from rlsys.controller.inputs import check_inputs
from rlsys.data.prompts import load_tokenizer
from rlsys.tracking.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

STEPS, PROMPTS, SAMPLES, PROBLEMS = 3, 32, 8, 60
OVERRIDES = (f"steps={STEPS}", f"eval.problems={PROBLEMS}", "rollout.temperature=0.7", "rollout.kv_cache_gib=0.2")
SUMMARY_KEYS = {
    "steps",
    "wall_s",
    "eval/initial_accuracy",
    "eval/final_accuracy",
    "tokens_generated",
    "tokens_trained",
    "tokens_per_s",
    "mismatch/logprob_abs_mean_max",
    "peak_memory_bytes",
}


class Run(NamedTuple):
    done: subprocess.CompletedProcess[str]
    folder: Path
    processes_after: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("vllm")
    done = launch(*OVERRIDES, cwd=root, RUN_OF_A_TEST=str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done, only_run(root), processes_marked(str(root)))


def test_the_run_says_what_it_does_and_leaves_no_process(run: Run) -> None:
    for words in ("804,224 parameters", "held-out accuracy", "curves.png", "Qwen/Qwen3-0.6B", f"step {STEPS}/{STEPS}"):
        assert words in run.done.stdout
    assert "Traceback" not in run.done.stderr
    assert run.processes_after == []


def test_the_summary_has_every_figure(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
    assert 0 < summary["eval/initial_accuracy"] < 1
    assert all(summary[name] > 0 for name in ("wall_s", "tokens_generated", "tokens_trained", "tokens_per_s"))
    assert summary["mismatch/logprob_abs_mean_max"] <= 1e-4
    assert 2**28 < summary["peak_memory_bytes"] < 8 * 2**30


def test_every_step_is_a_line_of_metrics_and_the_sampler_agrees_with_the_trainer(run: Run) -> None:
    lines = read_metrics(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"eval/accuracy"} <= lines[0].keys() & lines[-1].keys()
    for line in steps_of(run.folder):
        assert 0 < line["mismatch/logprob_abs_mean"] <= 1e-4
        assert line["rollout/samples"] == PROMPTS * SAMPLES
        assert (line["version/lineage"], line["version/step"]) == (0, line["step"])
        assert {"reward/mean", "policy/entropy", "train/grad_norm", "throughput/tokens_per_s"} <= line.keys()
        assert line.get("nonfinite") is None


def test_rollouts_are_written_as_text_tokens_rewards_and_versions(run: Run) -> None:
    tokenizer = load_tokenizer(str(run.folder / "model"))
    uids = set()
    for step in range(1, STEPS + 1):
        rows = read_jsonl(run.folder / "rollouts" / f"step-{step:06d}.jsonl")
        assert len(rows) == 16
        assert [row["sample_index"] for row in rows] == 2 * list(range(SAMPLES))
        uids |= {row["uid"] for row in rows}
        for row in rows:
            tokens = len(row["response_ids"])
            assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == row["response"]
            assert len(row["rollout_logprobs"]) == len(row["response_mask"]) == tokens
            assert all(value <= 0 for value in row["rollout_logprobs"])
            assert row["reward"] == row["scores"]["correct"] == float(row["response"] == row["answer"])
            # sampled by the weights that the step before left
            assert row["weight_versions"] == [{"lineage": 0, "step": step - 1, "tokens": tokens}]
    assert len(uids) == 2 * STEPS, "every step has prompts of its own"


def test_the_checkpoint_is_sealed_and_the_curves_are_a_picture(run: Run) -> None:
    newest = CheckpointStore(run.folder / "checkpoints", 2, True).latest()
    assert newest is not None
    assert newest.version == (0, STEPS)
    assert newest.metric == steps_of(run.folder)[-1]["eval/accuracy"]
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(run.folder.rglob("*partial*"))


def test_the_exported_model_answers_in_transformers_as_the_last_evaluation_measured(run: Run) -> None:
    """The export is in the source's bfloat16, the evaluation ran in float32: an answer or two may differ."""
    held_out = check_inputs(run_config(*OVERRIDES)).held_out
    assert held_out is not None
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    tokenizer = load_tokenizer(str(run.folder / "model"))
    prompts = torch.stack(jagged.to_rows(held_out.batch["prompt_ids"]))
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=8)
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    right = [text == task["answer"] for text, task in zip(texts, held_out.non_tensor_batch["task"], strict=True)]
    assert len(right) == PROBLEMS
    final = json.loads((run.folder / "summary.json").read_text())["eval/final_accuracy"]
    assert sum(right) / PROBLEMS == pytest.approx(final, abs=3 / PROBLEMS)
