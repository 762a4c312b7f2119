"""The reward functions that ship with rlsys, one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.rewards.exact_match import exact_match
from rlsys.rewards.length import length
from rlsys.rewards.math_verify import math_verify
from rlsys.rewards.numeric import numeric
from rlsys.rewards.reasoning_gym import reasoning_gym
from rlsys.rewards.regex import regex


def test_exact_match_options() -> None:
    assert exact_match(" 042\n", {"answer": "042"}).score == 1
    assert exact_match(" 042", {"answer": "042"}, strip=False).score == 0
    assert exact_match("42", {"answer": "042"}).score == 0
    assert exact_match("Paris", {"answer": "paris"}).score == 0
    assert exact_match("Paris", {"answer": "paris"}, ignore_case=True).score == 1
    assert exact_match("b", {"answer": ["a", "b"]}).score == 1
    assert exact_match("7", {"answer": 7}).score == 1
    assert exact_match("so <answer>7</answer>.", {"answer": 7}, tag="answer").score == 1
    assert exact_match("7", {"answer": 7}, tag="answer").score == 0


@given(st.text())
def test_exact_match_holds_of_a_text_and_itself(text: str) -> None:
    assert exact_match(text, {"answer": text}).score == 1
    assert exact_match(f"  {text}\n", {"answer": text}, ignore_case=True).score == 1
    assert exact_match(f"{text}x", {"answer": text}).score == 0


def test_regex_searches_or_matches_in_full() -> None:
    assert regex("so #### 5", {}, pattern=r"#### \d+").score == 1
    assert regex("so #### 5", {}, pattern=r"#### \d+", full=True).score == 0
    assert regex("#### 5", {}, pattern=r"#### \d+", full=True).score == 1


def test_numeric_tolerances_include_their_border() -> None:
    assert numeric("3.1", {"answer": 3}, absolute=0.1, relative=0).score == 1
    assert numeric("3.11", {"answer": 3}, absolute=0.1, relative=0).score == 0
    assert numeric("-101", {"answer": "-100"}, relative=0.01).score == 1
    assert numeric("-99.99", {"answer": "-100"}).score == 0
    assert numeric("nothing", {"answer": 0}).score == 0


@given(tokens=st.integers(0, 400), buffer=st.integers(1, 100))
def test_length_penalty_falls_linearly_over_the_buffer(tokens: int, buffer: int) -> None:
    penalty = length("…", {"response_tokens": tokens}, max_length=200, buffer=buffer)
    if tokens <= 200 - buffer:
        assert penalty == 0
    elif tokens >= 200:
        assert penalty == -1
    else:
        assert penalty == pytest.approx((200 - buffer - tokens) / buffer)


def test_length_of_text_without_a_rollout() -> None:
    assert length("a b c", {}, max_length=3, buffer=2, unit="words") == -1
    assert length("ab", {}, max_length=3, buffer=2, unit="characters") == -0.5
    with pytest.raises(ValueError, match="response_tokens"):
        length("ab", {}, max_length=3, buffer=2)


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"So \boxed{\frac{1}{2}}.", "0.5", 1), (r"So \boxed{0.5}.", r"\frac{1}{2}", 1),
        (r"$x^2+2x+1$", "$(x+1)^2$", 1), ("The answer is 18", "18", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1), (r"\boxed{3}", "4", 0), ("I do not know", "4", 0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1), ("1/3", 1 / 3, 1),
    ],
)  # fmt: skip
def test_math_verify_compares_mathematically(response: str, answer: object, score: float) -> None:
    assert math_verify(response, {"answer": answer}).score == score


def test_math_verify_refuses_a_row_that_nothing_could_match() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        math_verify("4", {"answer": ""})


def test_reasoning_gym_scores_its_own_answers() -> None:
    import reasoning_gym as package

    for name in ("basic_arithmetic", "letter_counting", "countdown"):
        for entry in package.create_dataset(name, size=3, seed=1):
            task = {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
            assert reasoning_gym(str(entry["answer"]), task).score == 1
            assert reasoning_gym(f"Hm.\n<answer>{entry['answer']}</answer>", task, extract="tag").score == 1
            assert reasoning_gym(str(entry["answer"]), task, extract="tag").score == 0
            assert reasoning_gym("<answer>certainly not</answer>", task).score < 0.1


def test_reasoning_gym_needs_its_own_rows() -> None:
    with pytest.raises(KeyError):
        reasoning_gym("1", {"answer": "1", "metadata": {}})
    with pytest.raises(ValueError, match="no_such_task"):
        reasoning_gym("1", {"answer": "1", "metadata": {"source_dataset": "no_such_task"}})
