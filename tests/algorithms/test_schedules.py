"""Shapes of the learning rate, and what weight decay leaves alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.schedules import Schedule, multiplier, no_decay

SCHEDULES = ["constant", "linear", "cosine", "wsd"]


@pytest.mark.parametrize("warmup", [0, 10])
def test_wsd_knots(warmup: int) -> None:
    total = warmup + 100
    at = {step: multiplier("wsd", warmup + step, total, warmup) for step in (1, 80, 81, 89, 98, 99, 100)}
    assert at[1] == at[80] == 1.0
    assert at[81] == pytest.approx(0.95)
    assert at[89] == pytest.approx(0.55)
    assert at[98] == pytest.approx(0.1)
    assert at[99] == pytest.approx(0.055)
    assert at[100] == pytest.approx(0.01)
    if warmup:
        assert multiplier("wsd", 1, total, warmup) == 0.1
        assert multiplier("wsd", warmup, total, warmup) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_matches_transformers(name: str, warmup: int) -> None:
    import transformers

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    # Theirs counts from 0 and starts at 0; after warm-up the two agree step by step.
    make = getattr(transformers, f"get_{name}_schedule_with_warmup")
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=50)
    for step in range(1, 51):
        theirs = optimizer.param_groups[0]["lr"]
        if step > warmup:
            assert multiplier(name, step, 50, warmup) == pytest.approx(theirs, abs=1e-12)  # type: ignore[arg-type]
        optimizer.step()
        scheduler.step()


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.integers(0, 300))
def test_rises_through_warmup_then_never_rises_and_stays_positive(name: Schedule, total: int, warmup: int) -> None:
    values = [multiplier(name, step, total, warmup) for step in range(1, total + 5)]
    assert all(0 < value <= 1 for value in values)
    after = values[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    before = values[:warmup]
    assert all(a < b for a, b in itertools.pairwise(before))
    if warmup < total - 1:
        assert max(values) == 1.0
        assert len(set(values[total - 1 :])) == 1  # past the end: the last one's


def test_steps_count_from_one_and_names_are_known() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        multiplier("constant", 0, 10)
    with pytest.raises(ValueError, match="triangle"):
        multiplier("triangle", 1, 10)  # type: ignore[arg-type]


def test_no_decay() -> None:
    left_alone = {
        "model.embed_tokens.weight": 2,
        "model.norm.weight": 1,
        "model.layers.0.input_layernorm.weight": 1,
        "model.layers.0.self_attn.q_norm.weight": 1,
        "model.layers.0.self_attn.q_proj.bias": 1,
        "transformer.wte.weight": 2,
        "some.scale": 1,
    }
    assert all(no_decay(name, ndim) for name, ndim in left_alone.items())
    decayed = ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    assert not any(no_decay(name, 2) for name in decayed)
