"""Feedback on arithmetic says what went wrong and never what is right."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.arithmetic import Problem, answer, prompt
from rlsys.rewards.arithmetic import (
    BORROW,
    CARRY,
    LENGTH,
    MISREAD,
    NO_NUMBER,
    OPERATION,
    PLACES,
    SIGN,
    arithmetic,
    column_result,
    feedback,
)
from rlsys.rewards.exact_match import exact_match

SLIPS = {CARRY, BORROW, MISREAD, SIGN, OPERATION, NO_NUMBER, LENGTH}
WORDS = {word for text in SLIPS for word in re.findall(r"\w+", text)} | {*PLACES, "and"}


@st.composite
def problems(draw):
    size = draw(st.integers(1, 3))
    operand = st.integers(0, 10**size - 1)
    return Problem(draw(operand), draw(st.sampled_from("+-")), draw(operand)), size


def judged(problem: Problem, digits: int, response: str):
    return arithmetic(response, {"prompt": prompt(problem, digits), "answer": answer(problem, digits)})


def plausible(problem: Problem, digits: int) -> set[str]:
    """Wrong answers that a solver may give: any one digit another one, off by a carry, misread, unpadded, unsigned."""
    right = answer(problem, digits)
    value = int(right)
    near = {f"{right[:i]}{digit}{right[i + 1 :]}" for i in range(len(right)) for digit in "0123456789"}
    carries = {f"{value + step:0{digits + 1}d}" for step in (-110, -100, -10, 10, 100)}
    read = {answer(Problem(problem.a, problem.operation, int(str(problem.b).replace("7", "1"))), digits)}
    return (near | carries | read | {str(value), right[:-1], f"-{right}", f"{right}0", "", "?"}) - {right}


@pytest.mark.parametrize("operation", ["+", "-"])
def test_feedback_has_no_digit_whatever_the_problem_and_the_attempt(operation):
    texts = set()
    pairs = [(a, b) for a in range(100) for b in range(100)]
    for a, b in random.Random(operation).sample(pairs, 3000):
        problem = Problem(a, operation, b)
        question, right = prompt(problem, 2), answer(problem, 2)
        texts |= {feedback(question, right, attempt) for attempt in plausible(problem, 2)}
    assert not any(re.search(r"\d", text) for text in texts)
    assert all(set(re.findall(r"\w+", text)) <= WORDS for text in texts)
    assert len(texts) < 20, "so few texts cannot tell nearly two hundred answers apart"
    assert max(map(len, texts)) <= 32, "a token a character"


@given(problems(), st.text(max_size=12))
def test_feedback_has_no_digit_of_any_response(drawn, response):
    result = judged(*drawn, response)
    if result.feedback is not None:
        assert set(re.findall(r"\w+", result.feedback)) <= WORDS


@given(problems(), st.text("0123456789- ", max_size=5))
def test_the_score_is_that_of_an_exact_match_and_feedback_comes_with_failures(drawn, response):
    for said in (response, answer(*drawn), f" {answer(*drawn)}\n"):
        result = judged(*drawn, said)
        assert result.score == exact_match(said, {"answer": answer(*drawn)}).score
        assert (result.feedback is None) == (result.score == 1.0)


@pytest.mark.parametrize(
    ("problem", "right", "attempt", "said"),
    [
        ("37+05=", "042", "032", "carry missing"),
        ("95+07=", "102", "092", "carry missing"),
        ("95+07=", "102", "002", "carry missing"),  # into the hundreds
        ("37+17=", "054", "048", "digit misread"),
        ("07+20=", "027", "021", "digit misread"),
        ("31+20=", "051", "057", "digit misread"),
        ("38+71=", "109", "049", "digit misread"),
        ("38+75=", "113", "043", "carry missing, digit misread"),
        ("20+10=", "030", "010", "wrong operation"),
        ("42-37=", "005", "015", "borrow missing"),
        ("500-001=", "0499", "0599", "borrow missing"),
        ("05-10=", "-005", "005", "wrong sign"),
        ("22+22=", "044", "035", "wrong tens and units"),
        ("22+22=", "044", "944", "wrong hundreds"),
        ("200+200=", "0400", "5400", "wrong thousands"),
        ("22+22=", "044", "44", "wrong length"),
        ("22+22=", "044", "", "not a number"),
        ("22+22=", "044", "4 4", "not a number"),
        ("what is six times seven?", "042", "041", "wrong units"),  # of another task, only what the answer shows
    ],
)
def test_feedback_names_the_slip_or_else_the_place(problem, right, attempt, said):
    assert arithmetic(attempt, {"prompt": problem, "answer": right}).feedback == said


@given(problems())
def test_columns_without_a_slip_give_the_answer(drawn):
    problem, digits = drawn
    left, right = (f"{operand:0{digits}d}" for operand in (problem.a, problem.b))
    assert column_result(left, problem.operation, right) == answer(problem, digits)


@given(problems(), st.integers(0, 15))
def test_a_forgotten_carry_is_called_one(drawn, forgotten):
    problem, digits = drawn
    left, right = (f"{operand:0{digits}d}" for operand in (problem.a, problem.b))
    attempt = column_result(left, problem.operation, right, forgotten)
    word = CARRY if problem.operation == "+" else BORROW
    assert judged(problem, digits, attempt).feedback == (None if attempt == answer(problem, digits) else word)
