"""Parts are checked before anything runs, and summed up as configured."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from rlsys.config.errors import UserError
from rlsys.config.schema import RewardPart
from rlsys.rewards.base import REWARDS, Failure, RewardResult, as_result
from rlsys.rewards.compose import build_parts, combine

MODULE = """
    from collections.abc import Sequence
    def good(response, task, *, limit: int = 3, names: Sequence[str] = (), anything=None): return 1.0
    def open_options(response, task, **options): return 1.0
    def one_argument(response): return 1.0
    def positional(response, task, limit=3): return 1.0
    async def asynchronous(response, task): return 1.0
    class Class: pass
    number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_composed_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)


def refused(parts: dict[str, RewardPart]) -> UserError:
    with pytest.raises(UserError) as caught:
        build_parts(parts)
    return caught.value


def test_every_shipped_reward_is_found() -> None:
    shipped = {"exact_match", "gsm8k", "length", "math_verify", "numeric", "reasoning_gym", "regex"}
    assert shipped <= set(REWARDS.names())


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("use", "args", "key", "words"),
    [
        ("gsm8", {}, "use", "no reward called"),
        ("my_composed_rewards.goood", {}, "use", "cannot be imported"),
        ("no_such_module.f", {}, "use", "cannot be imported"),
        ("my_composed_rewards.Class", {}, "use", "not a function"),
        ("my_composed_rewards.number", {}, "use", "not a function"),
        ("my_composed_rewards.asynchronous", {}, "use", "async"),
        ("my_composed_rewards.one_argument", {}, "use", "cannot be called"),
        ("my_composed_rewards.positional", {"limit": 3}, "args.limit", "unknown option"),
        ("my_composed_rewards.good", {"limt": 3}, "args.limt", "unknown option"),
        ("my_composed_rewards.good", {"limit": "3"}, "args.limit", "valid integer"),
        ("gsm8k", {"mode": "strikt"}, "args.mode", "'strict'"),
        ("regex", {}, "args.pattern", "needs the option"),
        ("regex", {"pattern": "("}, "args.pattern", "not a regular expression"),
        ("length", {"max_length": 5, "buffer": 9}, "args.buffer", "penalty"),
        ("numeric", {"relative": -1.0}, "args.relative", "below 0"),
    ],
)
def test_a_part_that_cannot_work_is_refused_with_its_key(use: str, args: dict, key: str, words: str) -> None:
    error = refused({"x": RewardPart(use=use, args=args)})
    assert error.where == f"reward.parts.x.{key}"
    assert words in error.what


@pytest.mark.usefixtures("mine")
def test_options_that_fit_are_accepted() -> None:
    args = {"limit": 4, "names": ["a"], "anything": object}
    build_parts({"x": RewardPart(use="my_composed_rewards:good", args=args)})
    build_parts({"x": RewardPart(use="my_composed_rewards.open_options", args={"anything": 1})})


def test_a_module_that_raises_on_import_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken_rewards.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)  # a file in the working directory counts
    error = refused({"x": RewardPart(use="my_broken_rewards.f")})
    assert "SyntaxError" in error.what
    assert error.where == "reward.parts.x.use"


def test_conditions_are_checked_in_their_place() -> None:
    match = RewardPart(use="exact_match")
    assert refused({"a": RewardPart(use="exact_match", when="a > 0"), "b": match}).where == "reward.parts.a.when"
    assert refused({"a": match, "b": RewardPart(use="exact_match", when="a >")}).where == "reward.parts.b.when"
    assert refused({}).where == "reward.parts"


def test_the_reward_is_the_weighted_sum_of_what_was_computed() -> None:
    parts = build_parts(
        {
            "a": RewardPart(use="exact_match", weight=2.0),
            "b": RewardPart(use="exact_match", weight=0.5),
            "c": RewardPart(use="exact_match", weight=-1.0, when="a > 1"),
        }
    )
    sample = combine(parts, {"a": RewardResult(1.0, "one", {"n": 1}), "b": RewardResult(0.5, "two")})
    assert sample.reward == 2.25
    assert sample.scores == {"a": 1.0, "b": 0.5, "c": None}
    assert sample.feedback == "one\ntwo"
    assert sample.info == {"a": {"n": 1}}
    failed = combine(parts, {"a": RewardResult(1.0), "b": Failure("raised", "b", "boom")})
    assert failed.reward == 0.0
    assert failed.scores == {"a": 1.0, "b": None, "c": None}
    assert failed.failure == Failure("raised", "b", "boom")


@pytest.mark.parametrize("value", [1, 0.5, True, RewardResult(1)])
def test_numbers_are_scores(value: object) -> None:
    result = as_result(value)
    assert type(result.score) is float


@pytest.mark.parametrize(
    "value",
    [None, "1", [1.0], 1j, float("nan"), float("inf"), RewardResult(float("-inf")), RewardResult(1.0, feedback=3),  # type: ignore[arg-type]
     RewardResult(1.0, info={"x": object()}), RewardResult(None)],  # type: ignore[arg-type]
)  # fmt: skip
def test_anything_else_is_no_score(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        as_result(value)
