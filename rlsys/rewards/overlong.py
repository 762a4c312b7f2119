"""DAPO's soft penalty on responses that come near the longest allowed."""

from __future__ import annotations

from typing import Any

from rlsys.config.errors import UserError
from rlsys.rewards.base import REWARDS, hooks
from rlsys.rewards.length import length


def _check(*, max_tokens: int, buffer: int, penalty: float = 1.0) -> None:
    if not 1 <= buffer <= max_tokens:
        raise UserError(
            f"the penalty cannot grow over the last {buffer} of {max_tokens} tokens",
            where="buffer",
            fix="choose 1 ≤ buffer ≤ max_tokens",
        )
    if not penalty > 0:
        raise UserError(f"penalty is what a response loses and must be more than 0, not {penalty}", where="penalty")


@REWARDS.register("overlong")
@hooks(check=_check, needs=("response_tokens",))
def overlong(response: str, task: dict[str, Any], *, max_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """Soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to ``max_tokens − buffer`` tokens, then falling
    linearly to ``−penalty`` at ``max_tokens`` and beyond.

    Args:
        max_tokens: usually ``data.max_response_tokens``, at which a response is cut off.
        buffer: the penalty grows over this many tokens before it.
        penalty: what the longest response loses.

    Raises:
        ValueError: the response did not come from a rollout.
    """
    return penalty * length(response, task, max_length=max_tokens, buffer=buffer)
