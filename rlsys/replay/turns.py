"""Turns of a trajectory: where the policy spoke, and the hint that an environment attached to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlsys.config.errors import UserError

HINT = "hint"  # the key in an environment's info


@dataclass(frozen=True)
class TurnHint:
    """turn: which of the sampled spans, from 0."""

    turn: int
    text: str


def turns(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Start and stop of the runs of sampled tokens in ``mask`` [T] bool."""
    edges = torch.diff(torch.nn.functional.pad(mask.to(torch.int8), (1, 1)))
    starts, stops = (torch.nonzero(edges == kind).flatten().tolist() for kind in (1, -1))
    return list(zip(starts, stops, strict=True))


def turn_hint(played: dict[str, Any], count: int, where: str) -> TurnHint | None:
    """The hint ``{"turn": k, "text": …}`` that the environment left in its info.

    Args:
        played: a cell of the column ``environment``.
        count: of the trajectory's turns. A hint to a turn that never came about is none.
        where: for errors.

    Raises:
        UserError: it is something else.
    """
    hint = played["info"].get(HINT)
    if hint is None:
        return None
    turn, text = (hint.get("turn"), hint.get("text")) if isinstance(hint, dict) else (None, None)
    if type(turn) is not int or turn < 0 or not isinstance(text, str):
        raise UserError(
            f"the environment's info has the hint {hint!r}",
            where=where,
            fix='give {"turn": number of the turn from 0, "text": "…"}',
        )
    return TurnHint(turn, text) if turn < count and text.strip() else None
