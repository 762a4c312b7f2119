"""Controllers that train on older samples: what they ask of the rest of the configuration."""

from __future__ import annotations

import pytest
from composing import composed

from rlsys.config.build import build
from rlsys.config.errors import UserError
from rlsys.config.modes import staleness_bound

CORRECTED = (
    ("algorithm.loss=decoupled_ppo",),
    ("algorithm.correction.tis_token={}",),
    ("algorithm.old_logprobs=sampler",),
)


@pytest.mark.parametrize("controller", ["one_step_off", "async"])
@pytest.mark.parametrize("overrides", CORRECTED)
def test_with_a_correction_older_samples_may_be_trained(controller: str, overrides: tuple[str, ...]) -> None:
    config = build(composed(f"controller={controller}", *overrides))
    assert staleness_bound(config.controller) == {"one_step_off": 1, "async": 4}[controller]


@pytest.mark.parametrize("controller", ["one_step_off", "async"])
def test_without_one_they_are_refused_unless_the_user_says_so(controller: str) -> None:
    with pytest.raises(UserError, match="nothing corrects for it") as error:
        build(composed(f"controller={controller}"))
    assert "controller.uncorrected=true" in (error.value.fix or "")
    assert build(composed(f"controller={controller}", "controller.uncorrected=true"))


def test_no_staleness_needs_no_correction() -> None:
    assert staleness_bound(build(composed("controller=async", "controller.max_staleness=0")).controller) == 0


@pytest.mark.parametrize("overrides", [*CORRECTED, ("controller.max_staleness=0",)])
def test_to_accept_a_bias_that_is_not_there_is_a_mistake(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="nothing is uncorrected"):
        build(composed("controller=async", "controller.uncorrected=true", *overrides))


def test_taking_turns_and_working_at_the_same_time_exclude_each_other() -> None:
    with pytest.raises(UserError, match="take turns"):
        build(composed("controller=async", "algorithm.loss=decoupled_ppo", "cluster.placement=colocated"))


@pytest.mark.parametrize("value", ["-1", "1.5", "many"])
def test_a_staleness_is_a_count(value: str) -> None:
    with pytest.raises(UserError, match="max_staleness"):
        build(composed("controller=async", f"controller.max_staleness={value}"))
