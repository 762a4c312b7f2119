"""Pairs by teacher agreement: chosen is the action that enough teachers give, rejected the policy's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NO_AGREEMENT, SAME_ACTION = "no_agreement", "same_action"


@dataclass(frozen=True)
class State:
    """What was done at one state. policy: its own action; teachers: theirs, one each."""

    policy: str
    teachers: Sequence[str]


@dataclass(frozen=True)
class AgreedPair:
    """state: its place among the states."""

    state: int
    chosen: str
    rejected: str


def agreement_pairs(states: Iterable[State], threshold: int) -> tuple[list[AgreedPair], dict[str, int]]:
    """The pairs of the states that give one, and why the others give none, by number.

    Chosen is the action that more teachers give than any other and at least ``threshold`` of them do, in the words of
    the first of them; rejected the policy's own. Actions are the same where they differ in white space alone. A state
    gives none where too few agree or two actions have the most votes (``no_agreement``), and where the policy did what
    the teachers would (``same_action``).
    """
    pairs: list[AgreedPair] = []
    dropped = {NO_AGREEMENT: 0, SAME_ACTION: 0}
    for place, state in enumerate(states):
        agreed = _agreed(state.teachers, threshold)
        if agreed is None:
            dropped[NO_AGREEMENT] += 1
        elif normalised(agreed) == normalised(state.policy):
            dropped[SAME_ACTION] += 1
        else:
            pairs.append(AgreedPair(place, agreed, state.policy))
    return pairs, dropped


def normalised(action: str) -> str:
    """White space as single spaces, none at the ends."""
    return " ".join(action.split())


def _agreed(teachers: Sequence[str], threshold: int) -> str | None:
    most = Counter(map(normalised, teachers)).most_common(2)
    if not most or most[0][1] < threshold or (len(most) == 2 and most[0][1] == most[1][1]):
        return None
    return next(action for action in teachers if normalised(action) == most[0][0])
