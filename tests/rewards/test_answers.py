"""Numbers as people write them; answers where people put them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.rewards.answers import (
    after_hashes,
    between_tags,
    find_number,
    gold_number,
    last_boxed,
    last_number,
    parse_number,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("18.", 18), ("18.0", 18), ("018", 18),
        ("+18", 18), ("-18", -18), ("−18", -18), (".5", Fraction(1, 2)),
        ("1,234", 1234), ("12,345,678.90", Fraction("12345678.9")), ("$18", 18),
        ("-$18", -18), ("$-18", -18), (r"\$18", 18),
        ("$ 18", 18), ("€1,000", 1000), ("50%", 50), ("18 apples", 18), ("18km", 18), ("18 per 2 days", 18),
        ("1/2", Fraction(1, 2)), ("-3/4 cup", Fraction(-3, 4)), ("5 1/2", Fraction(11, 2)),
        ("-5 1/2", Fraction(-11, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)), (r"5\frac{1}{2}", Fraction(11, 2)), (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("$18$", 18), (r"\(18\)", 18), ("**18**", 18), ("1{,}234", 1234), (r"1\,234", 1234), (r"18\text{ km}", 18),
        ("x = 5", 5), ("20 - 2 = 18", 18), ("18 (= 3*6)", 18), ("2e3", 2000), ("1e+16", 10**16), ("$18.", 18),
    ],
)  # fmt: skip
def test_a_number_is_read_however_it_is_written(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "apples", "1.2.3", "12,34", "1,2345", "12/25/2020", "3/0", "2 * 9", "3 + 4", "10-12", "2^10", r"5\sqrt{2}",
     r"\sqrt{2}", "9" * 5000, "the answer is 18"],
)  # fmt: skip
def test_what_is_no_single_number_is_not_half_read(text: str) -> None:
    assert parse_number(text) is None


numbers = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9)


@given(
    number=numbers,
    commas=st.booleans(),
    before=st.sampled_from(["", " ", "$", "**", r"\$", r"\(", "x = ", "="]),
    after=st.sampled_from(["", ".", " ", "%", " dollars", "**", r"\)", "00", r" \text{km}", " eggs a day."]),
    zeros=st.sampled_from(["", "00"]),
)
def test_formatting_does_not_change_the_value(number, commas: bool, before: str, after: str, zeros: str) -> None:
    text = f"{abs(number):,}" if commas else f"{zeros}{abs(number)}"
    written = f"{before}{'-' if number < 0 else ''}{text}{after}"
    assert parse_number(written) == Fraction(number)
    assert find_number(f"So 3 and 4 make this.\n#### {written}", "strict") == Fraction(number)
    assert find_number(rf"Hence \boxed{{{written}}}, of 7.", "boxed") == Fraction(number)


@given(number=numbers, wrong=numbers)
def test_two_numbers_are_equal_exactly_when_their_values_are(number, wrong) -> None:
    assert (parse_number(f"{number:,}") == parse_number(str(wrong))) == (number == wrong)


@given(st.text(max_size=200) | st.text(alphabet="0123456789.,/-+$%eE ={}\\()frac#<>boxed\n", max_size=200))
def test_no_text_makes_the_readers_raise(text: str) -> None:
    parse_number(text)
    last_boxed(text)
    between_tags(text, "answer")
    found = [find_number(text, mode) for mode in ("strict", "boxed", "last_number")]
    assert find_number(text, "flexible") == next((value for value in found if value is not None), None)


def test_the_last_number_is_the_last_one_that_is_whole() -> None:
    assert last_number("He has 3, then 4. So 1,250 dollars.") == 1250
    assert last_number("between 10-12") == 12
    assert last_number("it costs -$5.50!") == Fraction("-5.5")
    assert last_number("none") is None


def test_the_last_marker_counts() -> None:
    assert after_hashes("#### 1\nno, wait\n#### 2 \nsteps") == "2"
    assert after_hashes("no marker") is None
    assert last_boxed(r"\boxed{1} or \boxed{\frac{1}{2}} then") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} or \boxed{2") is None
    assert between_tags("<answer>1</answer> <answer> 2\n</answer>", "answer") == "2"
    assert between_tags("<answer>1", "answer") is None
    assert between_tags("</answer><answer>", "answer") is None


def test_modes_look_where_they_say() -> None:
    text = "It is \\boxed{2}.\n#### 1\nor 3"
    assert [find_number(text, mode) for mode in ("strict", "boxed", "last_number", "flexible")] == [1, 2, 3, 1]
    assert find_number("so it is \\boxed{2}, not 3", "flexible") == 2
    assert find_number("#### none of 3", "strict") is None


@pytest.mark.parametrize("answer", ["18", 18, 18.0, "3 + 15 = <<3+15=18>>18\n#### 18", "$18.00"])
def test_gold_answers_come_in_every_form(answer: object) -> None:
    assert gold_number(answer) == 18


@pytest.mark.parametrize("answer", ["", None, "eighteen", True, float("nan")])
def test_a_row_without_a_right_answer_is_an_error_and_no_zero(answer: object) -> None:
    with pytest.raises(ValueError, match="not a number"):
        gold_number(answer)
