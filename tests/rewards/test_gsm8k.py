"""GSM8K's own solutions are the evidence: every gold solution is right, and every answer off by one is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsys.config.schema import RewardPart
from rlsys.rewards.answers import Mode, gold_number
from rlsys.rewards.compose import build_parts
from rlsys.rewards.gsm8k import gsm8k
from rlsys.rewards.pool import RewardPool


@pytest.fixture(scope="module")
def rows(gsm8k_folder: Path) -> list[dict[str, str]]:
    lines = (gsm8k_folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) in (1319, 64)
    return [json.loads(line) for line in lines]


def off_by_one(solution: str) -> str:
    reasoning, _, answer = solution.rpartition("####")
    return f"{reasoning}#### {int(answer.replace(',', '')) + 1}"


def test_gold_solutions_score_one_and_perturbed_ones_zero(rows: list[dict[str, str]]) -> None:
    tasks = [{"prompt": r["question"], "answer": r["answer"].rpartition("####")[2].strip()} for r in rows]
    with RewardPool(build_parts({"correct": RewardPart(use="gsm8k", args={"mode": "strict"})})) as pool:
        gold = pool.score([(r["answer"], task) for r, task in zip(rows, tasks, strict=True)])
        wrong = pool.score([(off_by_one(r["answer"]), task) for r, task in zip(rows, tasks, strict=True)])
    assert [s.reward for s in gold] == [1.0] * len(rows)
    assert [s.reward for s in wrong] == [0.0] * len(rows)
    assert all(s.failure is None for s in gold + wrong)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("boxed", r"So \boxed{{{}}}."), ("last_number", "The answer is ${}."), ("flexible", r"\boxed{{{}}} of 7 eggs")],
)
def test_other_forms_of_the_answer_score_the_same(rows: list[dict[str, str]], mode: Mode, form: str) -> None:
    for row in rows:
        gold = gold_number(row["answer"])
        task = {"answer": row["answer"]}  # the whole solution does as an answer, too
        assert gsm8k(form.format(f"{int(gold):,}"), task, mode=mode).score == 1.0
        assert gsm8k(form.format(int(gold) - 1), task, mode=mode).score == 0.0


def test_feedback_does_not_give_the_answer_away() -> None:
    assert gsm8k("#### 5", {"answer": "18"}).feedback == "the final number is wrong"
    assert gsm8k("#### 18", {"answer": "18"}).feedback is None
    assert "no final number" in (gsm8k("well", {"answer": "18"}).feedback or "")
