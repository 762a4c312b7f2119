"""Other responses to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def solved_siblings(
    uids: Sequence[str], sample_index: Sequence[int], solutions: Sequence[str], solved: np.ndarray
) -> list[str | None]:
    """For each row the solution of the first *other* row of its group that solved the problem.

    Args:
        uids, sample_index: [B] group, and place in it that says what is first.
        solutions: [B] texts; a blank one (nothing was said but thoughts) is none.
        solved: [B] bool
    """
    first: dict[str, list[int]] = {}
    for row in sorted(range(len(uids)), key=lambda i: sample_index[i]):
        if solved[row] and solutions[row].strip():
            first.setdefault(uids[row], []).append(row)
    chosen = ([other for other in first.get(uid, [])[:2] if other != row] for row, uid in enumerate(uids))
    return [solutions[others[0]] if others else None for others in chosen]
