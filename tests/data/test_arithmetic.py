from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.config.schema import ArithmeticData
from rlsys.data.arithmetic import Problem, answer, hint, prompt, split
from rlsys.data.base import load_dataset


def config(**fields) -> ArithmeticData:
    sizes = {"prompts_per_step": 4, "max_prompt_tokens": 16, "max_response_tokens": 8}
    return ArithmeticData(kind="arithmetic", **sizes, **fields)


operations = st.lists(st.sampled_from(["+", "-"]), min_size=1, max_size=3)


@given(operations, st.integers(0, 99), st.integers())
def test_a_split_has_every_problem_on_exactly_one_side(operations, held_out, seed):
    train, kept = split(1, operations, held_out, seed)
    assert len(kept) == held_out
    assert sorted([*train, *kept]) == sorted(
        Problem(a, op, b) for op in set(operations) for a in range(10) for b in range(10)
    )


@given(st.integers(0, 99), st.integers(0, 99), st.integers())
def test_holding_out_more_keeps_what_was_held_out(fewer, more, seed):
    fewer, more = sorted((fewer, more))
    assert split(1, ["+"], more, seed)[1][:fewer] == list(split(1, ["+"], fewer, seed)[1])


def test_the_split_is_the_same_everywhere_and_follows_its_seed():
    # The bundled model was trained on the complement of these: they must never move.
    held_out = split(2, ["+"], 1000, 0)[1]
    assert [prompt(problem, 2) for problem in held_out[:5]] == ["80+05=", "74+62=", "05+00=", "53+31=", "81+62="]
    assert list(split(2, ["+"], 1000, 1)[1]) != list(held_out)


def test_a_problem_is_read_from_its_number_as_from_any_sequence():
    train, _ = split(2, ["-", "+"], 100, 3)
    assert train[-1] == train[len(train) - 1] == list(train)[-1]
    assert train[5:9] == [train[i] for i in range(5, 9)]
    assert {problem.operation for problem in train} == {"+", "-"}
    with pytest.raises(IndexError):
        train[len(train)]


@given(st.integers(1, 4), st.data())
def test_answers_are_right_and_of_a_fixed_width(digits, data):
    operand = st.integers(0, 10**digits - 1)
    problem = Problem(data.draw(operand), data.draw(st.sampled_from("+-")), data.draw(operand))
    text = answer(problem, digits)
    assert int(text) == (problem.a + problem.b if problem.operation == "+" else problem.a - problem.b)
    assert len(text.removeprefix("-")) == digits + 1
    left, right = prompt(problem, digits).removesuffix("=").split(problem.operation)
    assert (int(left), int(right), len(left), len(right)) == (problem.a, problem.b, digits, digits)


@pytest.mark.parametrize(
    ("problem", "digits", "question", "expected"),
    [
        (Problem(37, "+", 5), 2, "37+05=", "042"),
        (Problem(5, "-", 10), 2, "05-10=", "-005"),
        (Problem(9, "+", 9), 1, "9+9=", "18"),
        (Problem(999, "-", 0), 3, "999-000=", "0999"),
    ],
)
def test_problems_are_zero_padded(problem, digits, question, expected):
    assert prompt(problem, digits) == question
    assert answer(problem, digits) == expected


def test_rows_state_the_problem_and_its_answer():
    dataset = load_dataset(config(operations=["+", "-"], held_out=500))
    assert (len(dataset.train), len(dataset.held_out)) == (19_500, 500)
    training = {row.row_id for row in dataset.train}
    assert len(training) == 19_500
    assert training.isdisjoint(row.row_id for row in dataset.held_out)
    for row in [*dataset.train[:50], dataset.held_out[-1]]:
        text = row.task["prompt"]
        assert row.messages == [{"role": "user", "content": text}]
        assert int(row.task["answer"]) == sum(
            map(int, text.removesuffix("=").replace("+", " ").replace("-", " -").split())
        )
        assert text in row.where


def test_rows_bring_a_solution_and_a_hint_for_teachers():
    dataset = load_dataset(config(operations=["+", "-"], held_out=500))
    rows = {row.task["prompt"]: row.task for row in dataset.train}
    assert all(task["solution"] == task["answer"] for task in rows.values()), "as a right response looks"
    problems = [problem for problem in split(2, ["+", "-"], 500, 0)[0] if problem.a % 9 == 0]
    assert all(rows[prompt(problem, 2)]["hint"] == hint(problem, 2) for problem in problems)


@pytest.mark.parametrize(
    ("problem", "digits", "text"),
    [
        (Problem(37, "+", 5), 2, "mind the carry, mind the sevens"),
        (Problem(36, "+", 5), 2, "mind the carry"),
        (Problem(17, "+", 2), 2, "mind the sevens"),
        (Problem(90, "+", 20), 2, "mind the carry"),
        (Problem(34, "+", 25), 2, ""),
        (Problem(9, "+", 1), 1, "mind the carry"),
        (Problem(1, "-", 9), 1, ""),
        (Problem(42, "-", 35), 2, "mind the borrow"),
        (Problem(35, "-", 42), 2, "mind the borrow"),  # worked out as 42 - 35
        (Problem(500, "-", 1), 3, "mind the borrow"),
        (Problem(542, "-", 311), 3, ""),
    ],
)
def test_a_hint_says_what_to_mind_in_this_very_problem(problem, digits, text):
    assert hint(problem, digits) == text


@given(st.integers(1, 3), st.data())
def test_a_hint_has_no_digit_and_mentions_carries_and_sevens_where_there_are(digits, data):
    operand = st.integers(0, 10**digits - 1)
    problem = Problem(data.draw(operand), data.draw(st.sampled_from("+-")), data.draw(operand))
    text = hint(problem, digits)
    assert not any(letter.isdigit() for letter in text)
    assert ("sevens" in text) == ("7" in prompt(problem, digits))
    left, right = (f"{number:0{digits}d}" for number in (problem.a, problem.b))
    if problem.operation == "-":
        left, right = max(left, right), min(left, right)
    sign = 1 if problem.operation == "+" else -1
    alone = "".join(str((int(x) + sign * int(y)) % 10) for x, y in zip(left, right, strict=True))
    carries = ("carry" in text) or ("borrow" in text)
    assert carries == (f"0{alone}" != answer(problem, digits).removeprefix("-"))


def test_two_digit_additions_hold_out_a_thousand():
    dataset = load_dataset(config())
    assert (len(dataset.train), len(dataset.held_out)) == (9000, 1000)


@pytest.mark.parametrize(
    ("fields", "where"), [({"held_out": 100}, "data.held_out"), ({"operations": []}, "data.operations")]
)
def test_nothing_to_train_on_is_an_error(fields, where):
    with pytest.raises(UserError) as error:
        load_dataset(config(digits=1, **{"held_out": 1, **fields}))
    assert error.value.where == where
