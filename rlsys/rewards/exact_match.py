"""The response is the answer, letter for letter."""

from __future__ import annotations

from typing import Any

from rlsys.rewards.answers import between_tags
from rlsys.rewards.base import REWARDS, RewardResult, hooks


@REWARDS.register("exact_match")
@hooks(needs=("answer",))
def exact_match(
    response: str, task: dict[str, Any], *, strip: bool = True, ignore_case: bool = False, tag: str | None = None
) -> RewardResult:
    """1 if the response equals ``task["answer"]``, or any of it where that is a list; else 0.

    Args:
        strip: white space around either does not matter.
        ignore_case: neither do capitals.
        tag: only what stands in the last ``<tag>…</tag>`` counts.
    """
    given: str | None = response if tag is None else between_tags(response, tag)
    if given is None:
        return RewardResult(0.0, f"there is no <{tag}>…</{tag}>")
    answers = task["answer"] if isinstance(task["answer"], list | tuple) else [task["answer"]]

    def normal(text: str) -> str:
        text = text.strip() if strip else text
        return text.casefold() if ignore_case else text

    right = normal(given) in {normal(str(answer)) for answer in answers}
    return RewardResult(1.0) if right else RewardResult(0.0, "the answer is wrong")
