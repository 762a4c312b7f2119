"""A soft penalty on long responses."""

from __future__ import annotations

from typing import Any, Literal

from rlsys.config.errors import UserError
from rlsys.rewards.base import REWARDS, hooks


def _check(*, max_length: int, buffer: int, unit: str = "tokens") -> None:
    if buffer < 1 or max_length < buffer:
        raise UserError(
            f"the penalty cannot grow over the last {buffer} of {max_length} {unit}",
            where="buffer",
            fix="choose 1 ≤ buffer ≤ max_length",
        )


@REWARDS.register("length")
@hooks(check=_check)
def length(
    response: str,
    task: dict[str, Any],
    *,
    max_length: int,
    buffer: int,
    unit: Literal["tokens", "words", "characters"] = "tokens",
) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13): 0 up to ``max_length − buffer``, then falling linearly
    to −1 at ``max_length`` and beyond.

    Args:
        max_length: length at which the full penalty is reached.
        buffer: the penalty grows over this much before it.
        unit: tokens are those that the rollout counted (``task["response_tokens"]``).

    Raises:
        ValueError: tokens are wanted and the response did not come from a rollout.
    """
    if unit == "tokens":
        if "response_tokens" not in task:
            raise ValueError("the row has no 'response_tokens'; use unit=words or unit=characters on plain text")
        size = int(task["response_tokens"])
    else:
        size = len(response.split()) if unit == "words" else len(response)
    return -min(1.0, max(0, size - (max_length - buffer)) / buffer)
