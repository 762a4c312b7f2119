"""The language of ``when``: what it means, and that nothing else gets in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.rewards.conditions import parse_condition

SCORES = {"a": 1.0, "b": 0.25, "c": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a > 0.5", True), ("a < 0.5", False), ("b == 0.25", True), ("b != 0.25", False), ("a >= 1 and b <= 0", False),
        ("a >= 1 or b <= 0", True), ("not a > 2", True), ("not (a > 0 and b > 0)", False), ("0 < b < a", True),
        ("0 < b < -1", False), ("c > 0", False), ("c == 0", True), (" b > -1 ", True),
        ("a > b", True), ("+1 <= a", True),
        ("a > 2 or b > 0.2 and not c > 0", True),
    ],
)  # fmt: skip
def test_meaning(text: str, holds: bool) -> None:
    assert parse_condition(text, list(SCORES), [], where="w").holds(SCORES) is holds


@given(x=st.floats(-2, 2), y=st.floats(-2, 2), threshold=st.integers(-2, 2))
def test_agrees_with_python(x: float, y: float, threshold: int) -> None:
    text = f"x > {threshold} and not y <= x or y == {threshold}"
    expected = (x > threshold and not y <= x) or y == threshold
    assert parse_condition(text, ["x", "y"], [], where="w").holds({"x": x, "y": y}) is expected


@pytest.mark.parametrize(
    "text",
    ["", "a", "1", "a >", "a > 'x'", "a > True", "a + 1 > 2", "f(a) > 1", "a.b > 1", "a[0] > 1", "a in b", "a is b",
     "__import__('os').system('true') > 0", "lambda: 1", "a > 1 if b > 1 else b > 2", "(a := 1) > 0", "a > 1; b",
     "a and b", "not a", "a > 1j", "a\0 > 1", "[a > 1]"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_key(text: str) -> None:
    with pytest.raises(UserError, match="is not a condition") as caught:
        parse_condition(text, ["a", "b"], [], where="reward.parts.x.when")
    assert caught.value.where == "reward.parts.x.when"


def test_only_parts_that_are_computed_before() -> None:
    with pytest.raises(UserError, match="not computed yet") as later:
        parse_condition("length > 0", ["correct"], ["brief", "length"], where="reward.parts.brief.when")
    assert later.value.fix == "list 'length' before this part"
    with pytest.raises(UserError, match="is no part") as unknown:
        parse_condition("corect > 0", ["correct"], ["brief"], where="reward.parts.brief.when")
    assert "did you mean 'correct'?" in (unknown.value.fix or "")
