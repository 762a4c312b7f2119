"""Mathematical equivalence, by the math-verify package."""

from __future__ import annotations

import logging
from typing import Any

from rlsys.rewards.base import REWARDS, RewardResult, hooks


def _warm_up() -> None:
    import math_verify

    # It would warn, once a process, that its own time limit is off: here the pool has the time limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    math_verify.parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None)


@REWARDS.register("math_verify")
@hooks(needs=("answer",), warm_up=_warm_up)
def math_verify(response: str, task: dict[str, Any], *, precision: int = 6) -> RewardResult:
    """1 if the response's final expression is mathematically equal to ``task["answer"]``, else 0.

    Args:
        precision: decimals that have to agree where the comparison is numeric.

    Raises:
        ValueError: the row's answer cannot be read as an expression, so that no response could be right.
    """
    from math_verify import parse, verify

    gold_text = str(task["answer"])
    gold = parse(gold_text, parsing_timeout=None) or []
    if (
        "$" not in gold_text and "\\boxed" not in gold_text
    ):  # bare LaTeX, which the package only reads in an environment
        gold = parse(f"\\boxed{{{gold_text}}}", parsing_timeout=None) or gold
    if not gold:
        raise ValueError(f"the row's answer {gold_text!r:.120} cannot be read as an expression")
    found = parse(response, parsing_timeout=None)
    if not found:
        return RewardResult(0.0, "no final expression was found")
    right = verify(gold, found, float_rounding=precision, timeout_seconds=None)
    return RewardResult(1.0) if right else RewardResult(0.0, "the final expression is wrong")
