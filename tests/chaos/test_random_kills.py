"""A run that is killed again and again, at random moments, trains what one that is never killed trains."""

from __future__ import annotations

import random
import time

import pytest
from chaos_runs import Chaos, surviving

from rlsys.tracking.ledger import State

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS, STEPS, GROUPS, SAMPLES = 20, 120, 4, 4


def test_twenty_kills_of_the_driver_lose_no_sample_and_train_none_twice(chaos: Chaos) -> None:
    """Where a kill comes before anything was done since the last one, the run stands still; all others cost at most
    what came after the last checkpoint."""
    rng = random.Random(20)
    run = chaos(
        "controller=async", "algorithm.loss=decoupled_ppo", f"steps={STEPS}", "checkpoint.every=2", "resume=auto"
    )
    killed_at = []
    for number in range(KILLS):
        before = max(run.steps(), default=0)
        if number % 4:  # somewhere in a step; else somewhere in the start
            run.until_step(before + 1)
        time.sleep(rng.uniform(0, 1.5 if number % 4 else 8.0))
        if run.process.poll() is not None:
            break
        run.process.kill()
        run.process.wait()
        killed_at.append(max(run.steps(), default=0))
        run.start()
    assert run.ends(900) == 0
    found = surviving(run.folder)
    assert found.groups[State.TRAINED] == STEPS * GROUPS
    assert len(found.trained_ids) == STEPS * GROUPS * SAMPLES
    assert len(killed_at) == KILLS, f"it was done after {len(killed_at)} kills, at steps {killed_at}"
    assert run.left() == []
