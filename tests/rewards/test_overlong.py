"""DAPO's soft penalty on long responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.config.schema import RewardPart
from rlsys.rewards.compose import build_parts
from rlsys.rewards.overlong import overlong


@given(tokens=st.integers(0, 400), buffer=st.integers(1, 200), penalty=st.floats(0.1, 3))
def test_falls_linearly_over_the_buffer(tokens: int, buffer: int, penalty: float) -> None:
    score = overlong("…", {"response_tokens": tokens}, max_tokens=200, buffer=buffer, penalty=penalty)
    into = min(max(tokens - (200 - buffer), 0), buffer)
    assert score == pytest.approx(-penalty * into / buffer)


def test_the_papers_numbers() -> None:
    """20,480 tokens of which the last 4,096 are the buffer."""
    scores = [
        overlong("…", {"response_tokens": n}, max_tokens=20_480, buffer=4_096)
        for n in (0, 16_384, 18_432, 20_480, 30_000)
    ]
    assert scores == [0, 0, -0.5, -1, -1]


def test_needs_a_rollout() -> None:
    with pytest.raises(ValueError, match="response_tokens"):
        overlong("…", {}, max_tokens=200, buffer=10)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"max_tokens": 5, "buffer": 9}, "buffer"), ({"max_tokens": 5, "buffer": 0}, "buffer"),
        ({"max_tokens": 5, "buffer": 2, "penalty": -1.0}, "penalty"), ({"max_tokens": 5}, "buffer"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_a_run(args: dict, key: str) -> None:
    with pytest.raises(UserError) as caught:
        build_parts({"long": RewardPart(use="overlong", args=args)})
    assert caught.value.where == f"reward.parts.long.args.{key}"
