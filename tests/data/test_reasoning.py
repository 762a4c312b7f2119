from __future__ import annotations

import json

import numpy as np
import pytest

from rlsys.config.errors import UserError
from rlsys.config.schema import ReasoningGymData
from rlsys.data.base import Dataset, load_dataset
from rlsys.data.reasoning import json_like
from rlsys.rewards.reasoning_gym import reasoning_gym as score

SIZES = {"prompts_per_step": 4, "max_prompt_tokens": 512, "max_response_tokens": 64}


def load(task: str = "chain_sum", size: int = 30, eval_size: int = 10, **fields) -> Dataset:
    return load_dataset(
        ReasoningGymData(kind="reasoning_gym", task=task, size=size, eval_size=eval_size, **SIZES, **fields)
    )


@pytest.mark.parametrize(
    "task", ["chain_sum", "basic_arithmetic", "spell_backward", "arc_agi", "countdown", "mini_sudoku"]
)
def test_gold_answers_score_one_and_tasks_are_json(task):
    dataset = load(task, size=4, eval_size=2)
    for row in [*dataset.train, *dataset.held_out]:
        assert row.messages == [{"role": "user", "content": row.task["prompt"]}]
        assert row.task["metadata"]["source_dataset"] == task
        json.dumps(row.task)
        assert score(row.task["answer"], row.task).score == 1.0


def test_held_out_questions_are_new_and_asked_once():
    dataset = load(
        "basic_arithmetic", size=400, eval_size=200, options={"min_terms": 2, "max_terms": 2, "max_digits": 1}
    )
    asked = {row.task["prompt"] for row in dataset.train}
    held_out = [row.task["prompt"] for row in dataset.held_out]
    assert 0 < len(held_out) < 200
    assert asked.isdisjoint(held_out)
    assert len(set(held_out)) == len(held_out)


def test_nothing_left_to_hold_out_is_an_error():
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    with pytest.raises(UserError) as error:
        load(size=3000, eval_size=1, options=options)
    assert error.value.where == "data.eval_size"
    assert not load(size=3, eval_size=0).held_out


def test_problems_follow_the_seed_alone():
    def questions(dataset: Dataset) -> list[str]:
        return [row.task["prompt"] for row in [*dataset.train, *dataset.held_out]]

    assert questions(load(options={"seed": 5})) == questions(load(options={"seed": 5}))
    assert questions(load(options={"seed": 5})) != questions(load(options={"seed": 6}))


def test_options_reach_the_generator():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}
    assert all(row.task["metadata"]["num_terms"] == 2 for row in load(options=options).train)


@pytest.mark.parametrize(
    ("fields", "where", "fix"),
    [
        ({"task": "chain_sums"}, "data.task", "chain_sum"),
        ({"options": {"min_digit": 2}}, "data.options.min_digit", "min_digits"),
        ({"options": {"seed": "two"}}, "data.options.seed", "integer"),
        ({"options": {"size": 2}}, "data.options.size", "data.size"),
        ({"options": {"min_digits": 0}}, "data.options", "chain_sum"),
        ({"options": {"min_digits": "many"}}, "data.options", "chain_sum"),
    ],
)
def test_what_the_package_does_not_know_is_an_error(fields, where, fix):
    with pytest.raises(UserError) as error:
        load(**fields)
    assert error.value.where == where
    assert fix in str(error.value)


def test_metadata_keeps_tuples_and_becomes_json_otherwise():
    plain = json_like({"a": (1, [2]), "b": {3, 1}, "c": np.float32(0.5), "d": None})
    assert plain == {"a": (1, [2]), "b": [1, 3], "c": 0.5, "d": None}
    json.dumps(plain)
