"""The control: with rewards permuted over the batch there is nothing to learn, and nothing is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import launch, only_run

from rlsys.tracking.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def test_with_permuted_rewards_held_out_accuracy_does_not_rise(tmp_path: Path) -> None:
    done = launch("rollout=torch", "steps=20", "eval.every=5", "reward.permute=true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(only_run(tmp_path) / "metrics.jsonl")
    start, *later = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    assert len(later) == 4
    assert max(later) <= start + 0.03
