"""Generated arithmetic: the answer, letter for letter, and words on what may have gone wrong where it is not.

The words come from a closed list and hold no digit. They name the kind of a mistake, never the answer: whoever reads
them without the attempt still has to solve the problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from rlsys.rewards.base import REWARDS, RewardResult, hooks
from rlsys.rewards.exact_match import exact_match

CARRY, BORROW, MISREAD = "carry missing", "borrow missing", "digit misread"
SIGN, OPERATION = "wrong sign", "wrong operation"
NO_NUMBER, LENGTH = "not a number", "wrong length"
PLACES = ("units", "tens", "hundreds", "thousands")  # named where no slip explains the attempt

_PROBLEM = re.compile(r"(\d+)([+-])(\d+)=")
_LOOKALIKES = {"1": "17", "7": "71"}  # of a digit, what it may be read as


@REWARDS.register("arithmetic")
@hooks(needs=("prompt", "answer"))
def arithmetic(response: str, task: dict[str, Any]) -> RewardResult:
    """1 if the response equals ``task["answer"]``, else 0 with feedback; white space around either does not matter."""
    if exact_match(response, task).score == 1.0:
        return RewardResult(1.0)
    return RewardResult(0.0, feedback(str(task["prompt"]), str(task["answer"]).strip(), response.strip()))


def feedback(problem: str, answer: str, attempt: str) -> str:
    """What explains a wrong attempt: the slips that lead to it, or else the places whose digits are wrong.

    Args:
        problem: such as ``37+05=``; of any other text the slips are not looked for.
        answer, attempt: such as ``042``; they differ.
    """
    if not re.fullmatch(r"-?[0-9]+", attempt):
        return NO_NUMBER
    digits, given = answer.removeprefix("-"), attempt.removeprefix("-")
    if len(given) != len(digits):
        return LENGTH
    if given == digits:
        return SIGN
    if found := _PROBLEM.fullmatch(problem.strip()):
        for slips, result in _slips(*found.groups()):
            if result == attempt:
                return ", ".join(slips)
    wrong = [PLACES[i] for i in range(min(len(digits), len(PLACES))) if digits[-1 - i] != given[-1 - i]]
    return f"wrong {' and '.join(reversed(wrong))}" if wrong else LENGTH


def _slips(a: str, operation: str, b: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(slips, what they lead to): first one of a kind, then a misread digit beside a forgotten carry."""
    carry = CARRY if operation == "+" else BORROW
    columns = max(len(a), len(b))
    forgotten = range(1, 2 << columns)  # bit i: what is carried into column i is forgotten
    misread = [pair for pair in product(_readings(a), _readings(b)) if pair != (a, b)]
    yield from (((carry,), column_result(a, operation, b, bits)) for bits in forgotten)
    yield from (((MISREAD,), column_result(left, operation, right)) for left, right in misread)
    yield (OPERATION,), column_result(a, "-" if operation == "+" else "+", b)
    for left, right in misread:
        yield from (((carry, MISREAD), column_result(left, operation, right, bits)) for bits in forgotten)


def _readings(number: str) -> list[str]:
    return ["".join(read) for read in product(*(_LOOKALIKES.get(digit, digit) for digit in number))]


def column_result(a: str, operation: str, b: str, forgotten: int = 0) -> str:
    """Addition or subtraction column by column, of one digit more than the longer operand has.

    Args:
        forgotten: bit i is set where the carry (or borrow) into column i, counted from the units, is left out.
    """
    columns = max(len(a), len(b))
    a, b = a.zfill(columns), b.zfill(columns)
    negative = operation == "-" and a < b
    if negative:
        a, b = b, a
    sign = 1 if operation == "+" else -1
    digits, carry = "", 0  # carry: 1 where ten is carried, -1 where it is borrowed
    for i in range(columns):
        value = int(a[-1 - i]) + sign * int(b[-1 - i]) + (0 if forgotten >> i & 1 else carry)
        carry, digit = divmod(value, 10)
        digits = f"{digit}{digits}"
    return f"{'-' if negative else ''}{0 if forgotten >> columns & 1 else carry}{digits}"
