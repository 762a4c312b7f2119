"""The summary adds up over sessions and names what was never measured."""

import json
import math
from pathlib import Path

import pytest

from rlsys.tracking import alerts, summary
from rlsys.tracking.run import RunFolder

REQUIRED = {
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


def build(run: RunFolder, peak: int = 0) -> dict:
    return summary.build(run, name="grpo", seed=0, status="finished", peak_memory_bytes=peak)


def test_sessions_add_up(tmp_path: Path):
    run = RunFolder.create(tmp_path, "grpo", {})
    run.log_metrics({"eval/accuracy": 0.5}, step=0, lineage=0)
    for step in range(1, 5):
        step_metrics = {"rollout/tokens": 100, "train/tokens": 90, "time/step_s": 2.0, "memory/pss_bytes": 1000 * step}
        run.log_metrics(step_metrics | {"mismatch/logprob_abs_mean": 0.1 * step}, step=step, lineage=0)
    run.close()
    earlier = json.loads(run.metrics.read_text().splitlines()[-1])["time/elapsed_s"]

    again = RunFolder.open(run.path)
    again.session += 1  # sessions are told apart by their starting time, which is rounded to milliseconds
    again.log_metrics({"rollout/tokens": 50, "time/step_s": 1.0, "eval/accuracy": 0.75}, step=3, lineage=1)
    again.log_metrics({"rollout/tokens": 50, "time/step_s": 1.0, "eval/accuracy": 0.7}, step=4, lineage=1)
    result = build(again, peak=10)

    assert result["steps"] == 4
    assert result["tokens_generated"] == 300
    assert result["tokens_trained"] == 180 + 90  # step 3 of the first session gave its tokens to the same step's line
    assert result["tokens_per_s"] == pytest.approx(300 / 6)
    assert (result["eval/initial_accuracy"], result["eval/final_accuracy"]) == (0.5, 0.7)
    assert result["best"] == {"step": 3, "eval/accuracy": 0.75}
    assert result["mismatch/logprob_abs_mean_max"] == pytest.approx(0.3)
    assert result["peak_memory_bytes"] == 4000
    assert earlier <= result["wall_s"] <= earlier + again.elapsed_s() + 0.01
    again.write_summary(result)
    assert json.loads(again.summary.read_text()) == result


def test_a_run_that_did_nothing_has_a_summary_too(tmp_path: Path):
    result = build(RunFolder.create(tmp_path, "grpo", {}))
    assert set(result) >= REQUIRED
    assert result["steps"] == result["tokens_generated"] == 0
    assert result["eval/final_accuracy"] is result["tokens_per_s"] is result["mismatch/logprob_abs_mean_max"] is None


def test_values_that_are_not_finite_do_not_spoil_it(tmp_path: Path):
    run = RunFolder.create(tmp_path, "grpo", {})
    run.log_metrics({"mismatch/logprob_abs_mean": math.nan, "rollout/tokens": 5}, step=1, lineage=0)
    run.log_metrics({"mismatch/logprob_abs_mean": 0.25, "rollout/tokens": math.nan}, step=2, lineage=0)
    run.write_summary(build(run))
    written = json.loads(run.summary.read_text())
    assert (written["mismatch/logprob_abs_mean_max"], written["tokens_generated"]) == (0.25, 5)


@pytest.mark.parametrize(("mismatch", "raised"), [(0.01, False), (0.05, False), (0.0501, True), (math.nan, True)])
def test_mismatch_above_the_threshold_is_an_alert(mismatch: float, raised: bool):
    found = alerts.check({"mismatch/logprob_abs_mean": mismatch}, mismatch_alarm=0.05)
    assert alerts.as_metrics(found) == ({"alerts/mismatch": 1.0} if raised else {})


def test_a_loss_that_is_not_finite_is_an_alert():
    assert alerts.check({}, mismatch_alarm=0.05) == []
    (alert,) = alerts.check({"policy/loss": math.inf, "train/grad_norm": 1.0}, mismatch_alarm=0.05)
    assert "policy/loss" in alert.text
