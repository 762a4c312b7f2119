"""What the bundled start is trained on: solvers who answer better for what the context tells them."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlsys.data.arithmetic import Problem, answer, prompt, split
from rlsys.rewards.arithmetic import CARRY, MISREAD, feedback

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "start_model"
ROWS = 3000


@pytest.fixture(scope="module")
def contexts():
    sys.path.insert(0, str(RECIPE))
    try:
        yield importlib.import_module("contexts")
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def rows(contexts):
    training = split(2, ["+"], 1000, 0)[0]
    rng = np.random.default_rng(0)
    return [contexts.example(training, rng) for _ in range(ROWS)]


def parts(row) -> tuple[str, dict[str, str]]:
    """The problem and the sections of a row."""
    problem, *lines = row.text.split("\n")
    return problem, dict(line.split(": ") for line in lines)


def gold(problem: str) -> str:
    return answer(Problem(int(problem[:2]), "+", int(problem[3:5])), 2)


def test_no_row_is_about_a_held_out_problem(rows):
    assert {parts(row)[0] for row in rows}.isdisjoint(prompt(p, 2) for p in split(2, ["+"], 1000, 0)[1])


def test_every_mixture_of_sections_is_drawn_by_its_share(contexts, rows):
    drawn = Counter(tuple(parts(row)[1]) for row in rows)
    assert set(drawn) - {(), ("feedback",), ("hint",), ("solution",)} <= set(contexts.KINDS)
    for kind, share in contexts.KINDS.items():
        if "hint" not in kind:  # of a problem without anything to mind there is no hint to show
            assert drawn[kind] / ROWS == pytest.approx(share, abs=0.03)
    assert drawn[("hint",)] > 100


def test_a_solution_or_a_hint_is_followed(rows):
    for row in rows:
        problem, shown = parts(row)
        if "solution" in shown:
            assert row.response == shown["solution"] == gold(problem)
        if "hint" in shown:
            assert row.response == gold(problem)


def test_a_slip_that_feedback_names_is_not_made_again(rows):
    told = [(row.response, *parts(row)) for row in rows]
    told = [(said, gold(problem), problem, shown["feedback"]) for said, problem, shown in told if "feedback" in shown]
    for said, right, problem, words in told:
        if said != right:
            again = feedback(problem, right, said)
            assert CARRY not in again or CARRY not in words
            assert MISREAD not in again or MISREAD not in words
    assert 0.9 < np.mean([said == right for said, right, *_ in told]) < 1, "and others hardly ever"


def test_alone_a_problem_is_solved_as_carelessly_as_ever(rows):
    alone = [row for row in rows if not parts(row)[1]]
    assert 0.6 < np.mean([row.response == gold(row.text) for row in alone]) < 0.72


def test_rows_fit_the_model_and_its_characters(rows):
    sys.path.insert(0, str(RECIPE))
    tokenizer = importlib.import_module("tokenizer")
    sys.path.remove(str(RECIPE))
    assert all(set(row.text) <= set(tokenizer.CHARACTERS) for row in rows)
    assert max(len(row.text) + len(row.response) for row in rows) + 3 <= tokenizer.MAX_LENGTH
