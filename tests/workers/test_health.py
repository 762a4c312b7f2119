"""The health of an actor, beside a model: thousands of interleavings of what happens to it and what is said of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlsys.batch.versions import WeightVersion
from rlsys.workers.health import Health, State

ALLOWED = {
    State.HEALTHY: {State.SUSPECT, State.DEAD, State.STALE},
    State.SUSPECT: {State.HEALTHY, State.STALE, State.DEAD},
    State.DEAD: {State.RESTARTING},
    State.RESTARTING: {State.STALE, State.HEALTHY, State.DEAD},
    State.STALE: {State.HEALTHY, State.SUSPECT, State.DEAD},
}
versions = st.builds(WeightVersion, st.integers(0, 1), st.integers(0, 3))
lives = st.integers(0, 3)  # also of processes that are no more, or not yet


class Machine(RuleBasedStateMachine):
    """What is true of the process, kept apart from what the machine under test believes."""

    holds_weights = True

    def __init__(self) -> None:
        super().__init__()
        self.health = Health.started(holds_weights=self.holds_weights)
        self.current: WeightVersion | None = None
        self.given: dict[int, WeightVersion | None] = {0: None}  # by life, the weights it was given last
        self.ended: set[int] = set()  # lives that are known to be over
        self.restarts = 0

    def became(self, after: Health) -> None:
        before, self.health = self.health, after
        assert after.state is before.state or after.state in ALLOWED[before.state], (before, after)
        assert after.holds_weights == before.holds_weights
        if after.state is State.HEALTHY and before.state is State.RESTARTING:
            assert not self.holds_weights, "a sampler that comes back is stale first"

    @rule(life=lives)
    def answers(self, life: int) -> None:
        self.became(self.health.answered(life))

    @rule(seconds=st.floats(0, 100))
    def is_silent(self, seconds: float) -> None:
        alive = self.health.alive
        self.became(self.health.silent(seconds, suspect_s=30, dead_s=60))
        if alive and seconds >= 60:
            assert self.health.state is State.DEAD
            self.ended.add(self.health.life)
        elif alive and seconds >= 30:
            assert self.health.state is State.SUSPECT

    @rule(life=lives)
    def ends(self, life: int) -> None:
        if self.health.alive and life == self.health.life:
            self.ended.add(life)
        self.became(self.health.ended(life))

    @precondition(lambda self: self.health.state is State.DEAD)
    @rule()
    def is_restarted(self) -> None:
        self.became(self.health.restart_begun())
        self.given[self.health.life] = None
        self.restarts += 1

    @precondition(lambda self: self.health.state is not State.DEAD)
    @rule()
    def only_the_dead_are_restarted(self) -> None:
        with pytest.raises(ValueError, match="only a dead actor"):
            self.health.restart_begun()

    @rule(life=lives)
    def has_started(self, life: int) -> None:
        self.became(self.health.restart_done(life))

    @rule(life=lives)
    def did_not_start(self, life: int) -> None:
        if self.health.state is State.RESTARTING and life == self.health.life:
            self.ended.add(life)
        self.became(self.health.restart_failed(life))

    @rule(version=versions)
    def new_weights(self, version: WeightVersion) -> None:
        self.current = version
        self.became(self.health.weights_wanted(version))

    @rule(version=versions, life=lives)
    def was_given(self, version: WeightVersion, life: int) -> None:
        if self.health.alive and life == self.health.life:
            self.given[life] = version
        self.became(self.health.weights_given(version, life))

    @rule()
    def step_is_done(self) -> None:
        self.restarts = 0 if self.health.alive else self.restarts
        self.became(self.health.step_done())

    @invariant()
    def a_life_that_ended_is_never_taken_for_alive(self) -> None:
        assert not (self.health.alive and self.health.life in self.ended)

    @invariant()
    def who_is_healthy_holds_the_current_weights(self) -> None:
        if self.health.state is State.HEALTHY and self.holds_weights:
            given = self.given[self.health.life]
            first = self.health.life == 0 and self.current is None and given is None
            assert first or given == self.current

    @invariant()
    def restarts_are_counted_since_the_last_whole_step(self) -> None:
        assert self.health.restarts == self.restarts


class WithoutWeights(Machine):
    """Reward and reference: they come back healthy."""

    holds_weights = False

    @invariant()
    def it_is_never_stale(self) -> None:
        assert self.health.state is not State.STALE


many = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestSampler = Machine.TestCase
TestSampler.settings = many
TestWithoutWeights = WithoutWeights.TestCase
TestWithoutWeights.settings = many


def test_a_sampler_that_comes_back_waits_for_the_current_weights() -> None:
    old, new = WeightVersion(0, 1), WeightVersion(0, 2)
    health = Health.started(holds_weights=True).weights_wanted(old).weights_given(old, 0)
    assert health.state is State.HEALTHY
    health = health.ended(0).restart_begun().weights_wanted(new).restart_done(1)
    assert health.state is State.STALE
    assert health.weights_given(new, 0) == health, "its former process held them, if at all"
    assert health.weights_given(old, 1).state is State.STALE
    assert health.weights_given(new, 1).state is State.HEALTHY


def test_one_that_joins_is_stale_until_it_has_weights() -> None:
    version = WeightVersion(0, 5)
    joined = Health.joining(holds_weights=True, wanted=version).restart_done(1)
    assert joined.state is State.STALE
    assert joined.weights_given(version, 1).state is State.HEALTHY
