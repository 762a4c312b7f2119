"""A number within a tolerance."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rlsys.config.errors import UserError
from rlsys.rewards.answers import Mode, find_number, gold_number
from rlsys.rewards.base import REWARDS, RewardResult, hooks


def _check(*, absolute: float = 0.0, relative: float = 1e-6, mode: str = "flexible") -> None:
    for name, value in (("absolute", absolute), ("relative", relative)):
        if value < 0:
            raise UserError(f"a tolerance of {value} is below 0", where=name, fix="choose 0 or more")


@REWARDS.register("numeric")
@hooks(needs=("answer",), check=_check)
def numeric(
    response: str, task: dict[str, Any], *, absolute: float = 0.0, relative: float = 1e-6, mode: Mode = "flexible"
) -> RewardResult:
    """1 if the response's final number is within ``absolute``, or ``relative`` · |answer|, of ``task["answer"]``.

    Args:
        mode: where the final number is looked for, see :func:`rlsys.rewards.answers.find_number`.

    Raises:
        ValueError: the row's answer is not a number.
    """
    gold = gold_number(task["answer"])
    found = find_number(response, mode)
    if found is None:
        return RewardResult(0.0, f"no final number was found ({mode})")
    # The tolerances as they are written (0.1 is a tenth), so that a number on the border is inside.
    tolerance = max(Fraction(str(absolute)), Fraction(str(relative)) * abs(gold))
    return RewardResult(1.0) if abs(found - gold) <= tolerance else RewardResult(0.0, "the final number is wrong")
