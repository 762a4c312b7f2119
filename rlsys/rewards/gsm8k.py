"""GSM8K: is the final number right?"""

from __future__ import annotations

from typing import Any

from rlsys.rewards.answers import Mode, find_number, gold_number
from rlsys.rewards.base import REWARDS, RewardResult, hooks


@REWARDS.register("gsm8k")
@hooks(needs=("answer",))
def gsm8k(response: str, task: dict[str, Any], *, mode: Mode = "flexible") -> RewardResult:
    """1 if the response's final number equals ``task["answer"]`` exactly, else 0.

    Args:
        mode: where the final number is looked for, see :func:`rlsys.rewards.answers.find_number`.

    Raises:
        ValueError: the row's answer is not a number.
    """
    gold = gold_number(task["answer"])
    found = find_number(response, mode)
    if found is None:
        return RewardResult(0.0, f"no final number was found ({mode})")
    return RewardResult(1.0) if found == gold else RewardResult(0.0, "the final number is wrong")
