"""TAID's schedule: never falls, ends where it should, and survives a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.taid import TaidState, advance
from rlsys.config.errors import UserError

LOSSES = st.lists(st.floats(0, 100), min_size=1, max_size=40)


def run(losses: list[float], **options: float) -> list[TaidState]:
    states = [TaidState(options.get("t_start", 0.4))]
    for step, loss in enumerate(losses, 1):
        states.append(advance(states[-1], loss, step, len(losses), **options))
    return states


def test_the_first_update_only_stores_its_loss() -> None:
    assert advance(TaidState(0.4), 2.5, 1, 10) == TaidState(0.4, 0.0, 2.5)


def test_the_second_update_by_hand() -> None:
    state = advance(TaidState(0.4, 0.0, 2.0), 1.0, 2, 1000, alpha=0.1)
    momentum = 0.01 * 0.5
    assert state.momentum == pytest.approx(momentum)
    assert state.t == pytest.approx(0.4 + 0.1 / (1 + math.exp(-momentum)) * 0.6)


@given(LOSSES, st.floats(0, 1), st.floats(0, 0.999))
def test_never_falls_and_stays_between_the_line_and_the_end(losses: list[float], alpha: float, beta: float) -> None:
    states = run(losses, t_start=0.3, t_end=0.9, alpha=alpha, beta=beta)
    for step, (before, after) in enumerate(pairwise(states), 1):
        assert before.t <= after.t <= 0.9
        if step > 1:
            assert after.t >= min(0.9, 0.3 + 0.6 * step / len(losses))
    if len(losses) > 1:
        assert states[-1].t == 0.9


@given(LOSSES)
def test_a_state_from_json_goes_on_with_the_same_numbers(losses: list[float]) -> None:
    state = TaidState(0.4)
    for step, loss in enumerate(losses, 1):
        state = advance(TaidState(**json.loads(json.dumps(asdict(state)))), loss, step, 50)
    straight = TaidState(0.4)
    for step, loss in enumerate(losses, 1):
        straight = advance(straight, loss, step, 50)
    assert state == straight


def test_a_falling_loss_runs_ahead_of_a_rising_one() -> None:
    options = {"alpha": 0.2, "beta": 0.5}
    early = [run(losses, **options)[5].t for losses in ([2.0**-i for i in range(100)], [1 + i for i in range(100)])]
    assert early[0] > early[1]


def test_only_relative_changes_count() -> None:
    losses = [3.0, 2.0, 2.5, 1.0]
    ts = [[state.t for state in run([scale * loss for loss in losses], alpha=0.3)] for scale in (1, 1024)]
    assert ts[0] == pytest.approx(ts[1])


@pytest.mark.parametrize("options", [{"t_start": -0.1}, {"t_end": 1.1}, {"t_end": 0.3}, {"alpha": 2.0}, {"beta": 1.0}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        advance(TaidState(0.4), 1.0, 1, 10, **options)
    assert caught.value.where == f"algorithm.distillation.divergence_options.{next(iter(options))}"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        advance(TaidState(0.4), loss, 1, 10)
