"""The buffer of prompt groups keeps its bounds whatever ends when: a model that goes beside it through random
interleavings, and an adversary that always ends the wrong group first."""

import random
from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlsys.controller.buffer import PATIENCE, GroupBuffer, State


class BufferMachine(RuleBasedStateMachine):
    """Does what a stream does, and keeps books of its own: attempt of every group that was handed out and neither
    trained nor dropped."""

    @initialize(bound=st.integers(0, 4), per_step=st.integers(1, 4), ordered=st.booleans(), partial=st.booleans())
    def begin(self, bound: int, per_step: int, ordered: bool, partial: bool) -> None:
        self.bound, self.per_step, self.ordered, self.partial = bound, per_step, ordered, partial
        self.buffer = GroupBuffer(per_step, bound, ordered=ordered)
        self.step = 0
        self.attempts: dict[Hashable, int] = {}
        self.given_up: list[tuple[Hashable, int]] = []
        self.taken: list[Hashable] = []
        self.ever = 0
        self.trained: set[Hashable] = set()

    @rule(share=st.floats(0, 1))
    def hand_out(self, share: float) -> None:
        for _ in range(round(share * self.buffer.room)):
            self.attempts[self.ever] = 0
            self.buffer.hand_out(self.ever)
            self.ever += 1

    @rule()
    def no_room_for_more(self) -> None:
        if self.buffer.room == 0:
            with pytest.raises(ValueError, match="no room"):
                self.buffer.hand_out(self.ever)

    @rule(rng=st.randoms(use_true_random=False))
    def sampled(self, rng: random.Random) -> None:
        for key in self._some(rng, State.IN_FLIGHT):
            assert self.buffer.is_expected(key, self.attempts[key])
            self.buffer.ready(key)
            assert not self.buffer.is_expected(key, self.attempts[key])

    @rule()
    def sampled_too_late(self) -> None:
        assert not any(self.buffer.is_expected(key, attempt) for key, attempt in self.given_up)

    @rule(rng=st.randoms(use_true_random=False))
    def lost(self, rng: random.Random) -> None:
        """Their worker died."""
        self._reissue(self._some(rng, State.IN_FLIGHT))

    @rule(rng=st.randoms(use_true_random=False))
    def filtered(self, rng: random.Random) -> None:
        for key in self._some(rng, State.READY, State.IN_FLIGHT):
            self.buffer.drop(key)
            del self.attempts[key]

    @precondition(lambda self: not self.taken and self.buffer.version == self.step)
    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        count = min(count, self.per_step) if self.partial else self.per_step
        keys = self.buffer.take(self.step, count)
        if keys is not None:
            self._took(keys, count)

    @precondition(lambda self: self.taken)
    @rule()
    def train(self) -> None:
        """The trainer has new weights; samplers still have the old ones."""
        for key in self.taken:
            self.buffer.trained(key)
            self.trained.add(key)
            del self.attempts[key]
        self.taken = []
        self.step += 1
        self.buffer.step = self.step

    @precondition(lambda self: self.buffer.version < self.step)
    @rule()
    def sync(self) -> None:
        self.buffer.version = self.step
        self._reissue(self.buffer.expired(self.step))
        assert not any(self._age(key) > self.bound for key in self.attempts)

    @precondition(lambda self: not self.taken)
    @rule()
    def resume(self) -> None:
        """Another process goes on: what was outstanding is handed out again first."""
        self.buffer = GroupBuffer(self.per_step, self.bound, ordered=self.ordered)
        self.buffer.version = self.buffer.step = self.step
        for key, attempt in self.attempts.items():
            self.given_up.append((key, attempt))
            self.attempts[key] = attempt + 1
            self.buffer.hand_out(key, attempt=attempt + 1)

    @precondition(lambda self: not self.taken and self.buffer.version == self.step)
    @rule()
    def everything_ends(self) -> None:
        """Nothing is in the way of a step once nothing is under way."""
        self.hand_out(1.0)
        for key in self.buffer.within(State.IN_FLIGHT):
            self.buffer.ready(key)
        keys = self.buffer.take(self.step)
        assert keys is not None
        self._took(keys, self.per_step)

    @precondition(lambda self: hasattr(self, "buffer"))
    @invariant()
    def no_group_is_lost_or_admitted_too_many(self) -> None:
        assert set(self.buffer.within()) == set(self.attempts)
        steps_left = self.bound + 1 - (self.step - self.buffer.version)
        assert self.buffer.room == max(0, steps_left * self.per_step - len(self.buffer))
        assert len(self.buffer) <= (self.bound + 1) * self.per_step
        assert set(self.buffer.within(State.TAKEN)) == set(self.taken)
        assert all(self.buffer[key].attempt == attempt for key, attempt in self.attempts.items())

    @precondition(lambda self: hasattr(self, "buffer") and not self.partial)
    @invariant()
    def nobody_starves(self) -> None:
        """A group passes its last chance only where a whole step of older ones have theirs at once: of those there are
        at most ``bound`` steps' worth."""
        assert all(self.buffer[key].late <= PATIENCE + self.bound for key in self.attempts)

    def _took(self, keys: list[Hashable], count: int) -> None:
        assert len(keys) == len(set(keys)) == count
        assert all(self._age(key) <= self.bound for key in keys)
        assert not self.trained & set(keys)
        if self.ordered:
            turns = sorted(self.buffer[key].turn for key in self.attempts if self._age(key) <= self.bound)
            assert [self.buffer[key].turn for key in keys] == turns[:count]
        self.taken = keys

    def _age(self, key: Hashable) -> int:
        return self.step - self.buffer[key].version

    def _reissue(self, keys: list[Hashable]) -> None:
        for key in keys:
            self.given_up.append((key, self.attempts[key]))
            self.attempts[key] += 1
            assert self.buffer.reissue(key).version == self.buffer.version

    def _some(self, rng: random.Random, *states: State) -> list[Hashable]:
        return [key for key in self.buffer.within(*states) if rng.random() < 0.4]


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_a_group_that_always_ends_last_is_trained_all_the_same(bound: int):
    """Everything else is ready at once; this one ends only when nothing else lets the step go on."""
    per_step = 3
    buffer = GroupBuffer(per_step, bound)
    buffer.hand_out("slow")
    number, step = 0, 0
    while "slow" in buffer.within():
        assert step <= (PATIENCE + 1) * (bound + 1)
        while buffer.room:
            buffer.hand_out(number)
            number += 1
        for key in buffer.within(State.IN_FLIGHT):
            if key != "slow":
                buffer.ready(key)
        keys = buffer.take(step)
        if keys is None:
            buffer.ready("slow")
            keys = buffer.take(step)
        assert keys is not None
        for key in keys:
            buffer.trained(key)
        step += 1
        buffer.version = step
        for key in buffer.expired(step):
            buffer.reissue(key)
    assert buffer.version <= (PATIENCE + 1) * (bound + 1)


def test_a_step_waits_for_nobody_who_may_still_end_later():
    buffer = GroupBuffer(2, 1)
    for key in ("slow", "a", "b"):
        buffer.hand_out(key)
    for key in ("a", "b"):
        buffer.ready(key)
    assert buffer.take(0) == ["a", "b"]


def test_the_oldest_weights_are_taken_first():
    buffer = GroupBuffer(1, 2)
    buffer.hand_out("reissued")
    buffer.hand_out("old")
    buffer.version = 1
    buffer.reissue("reissued")
    buffer.ready("reissued")
    buffer.ready("old")
    assert buffer.take(1) == ["old"]
    assert buffer.take(1) == ["reissued"]


def test_what_is_not_so_is_refused():
    buffer = GroupBuffer(1, 1)
    buffer.hand_out("a")
    with pytest.raises(ValueError, match="already"):
        buffer.hand_out("a")
    with pytest.raises(ValueError, match="in flight"):
        buffer.trained("a")
    buffer.ready("a")
    with pytest.raises(ValueError, match="ready"):
        buffer.ready("a")
    assert buffer.take(0) == ["a"]
    for refused in (buffer.reissue, buffer.drop, buffer.ready):
        with pytest.raises(ValueError, match="taken"):
            refused("a")
