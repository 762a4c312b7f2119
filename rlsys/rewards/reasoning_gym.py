"""Tasks of the package reasoning-gym, scored by the task's own verifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from rlsys.rewards.answers import between_tags
from rlsys.rewards.base import REWARDS, RewardResult, hooks


def _warm_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # syntax warnings of the packages that it imports
        import reasoning_gym  # noqa: F401


@cache
def _verifier(dataset: str) -> Callable[[str | None, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(dataset)


@REWARDS.register("reasoning_gym")
@hooks(needs=("answer", "metadata"), warm_up=_warm_up)
def reasoning_gym(
    response: str, task: dict[str, Any], *, extract: Literal["tag", "all", "flexible"] = "flexible", tag: str = "answer"
) -> RewardResult:
    """The score, 0 … 1, that the task's generator gives to the answer; some give partial credit.

    ``task["metadata"]`` is the entry's own, with ``source_dataset``.

    Args:
        extract: the answer is what the last ``<tag>…</tag>`` holds, ``all`` of the response, or (``flexible``) the one
            where there is such a pair and else the other.

    Raises:
        ValueError, KeyError: the row was not made by reasoning-gym.
    """
    answer = None if extract == "all" else between_tags(response, tag)
    if answer is None:
        if extract == "tag":
            return RewardResult(0.0, f"there is no <{tag}>…</{tag}>")
        answer = response.strip()
    metadata = task["metadata"]
    entry = {"question": task.get("question", task.get("prompt", "")), "answer": task["answer"], "metadata": metadata}
    score = float(_verifier(metadata["source_dataset"])(answer, entry))
    return RewardResult(
        score, None if score >= 1 else "the answer is wrong" if score <= 0 else "the answer is partly right"
    )
