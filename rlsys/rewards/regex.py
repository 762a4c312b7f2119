"""The response has a form: a pattern matches."""

from __future__ import annotations

import re
from typing import Any

from rlsys.config.errors import UserError
from rlsys.rewards.base import REWARDS, RewardResult, hooks


def _check(*, pattern: str, full: bool = False) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"'{pattern}' is not a regular expression: {error}", where="pattern", fix="see Python's re for the syntax"
        ) from None


@REWARDS.register("regex")
@hooks(check=_check)
def regex(response: str, task: dict[str, Any], *, pattern: str, full: bool = False) -> RewardResult:
    """1 if ``pattern`` (Python's ``re``; flags inline, as in ``(?s)``) matches, else 0.

    Args:
        full: it has to match the whole response, not a part of it.
    """
    match = re.fullmatch(pattern, response) if full else re.search(pattern, response)
    return RewardResult(1.0) if match else RewardResult(0.0, "the response does not have the expected form")
