"""What the loss carries from step to step."""

from __future__ import annotations

import pytest
from composing import run_config, with_leaves

from rlsys.controller.step_state import after_update, taid_t

TAID = {
    "algorithm.distillation.weight": 1.0,
    "algorithm.distillation.divergence": "taid",
    "algorithm.distillation.divergence_options": {"alpha": 0.05},
}
LEARNT = {"distillation/loss": 2.0, "distillation/tokens": 40.0, "train/skipped": 0.0}


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param(LEARNT | {"distillation/loss": 0.0, "distillation/tokens": 0.0}, id="no token with a teacher"),
        pytest.param(LEARNT | {"distillation/loss": 0.5, "train/skipped": 1.0}, id="skipped"),
        pytest.param(LEARNT | {"distillation/loss": float("nan")}, id="not finite"),
        pytest.param({"critic/loss": 1.0}, id="the critic alone"),
    ],
)
def test_taid_follows_only_updates_that_were_learnt_from(metrics: dict[str, float]) -> None:
    config = with_leaves(run_config("steps=10"), TAID)
    extra = after_update(config, {}, LEARNT, 1)
    assert after_update(config, extra, metrics, 2) == extra

    # The next one goes on from the last loss that there was: a falling loss still has a momentum that falls with it.
    resumed = after_update(config, after_update(config, extra, metrics, 2), LEARNT | {"distillation/loss": 1.0}, 3)
    assert resumed == after_update(config, extra, LEARNT | {"distillation/loss": 1.0}, 3)
    assert 0 < resumed["taid"]["momentum"] < 1
    assert taid_t(config, resumed) > taid_t(config, extra)
