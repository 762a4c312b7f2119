"""How many samples of a step may have no reward before the run stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.config.errors import UserError
from rlsys.rewards.base import Failure
from rlsys.rewards.compose import ScoredSample

_SHOWN = 3


class RewardBudgetExceeded(UserError):
    """More samples failed than ``reward.max_failure_rate`` allows.

    Args:
        rows: the failures, as :func:`failure_rows` gives them.
    """

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, rows: Sequence[dict[str, Any]] = ()
    ):
        super().__init__(what, where=where, fix=fix)
        self.rows = list(rows)

    def __reduce__(self) -> tuple:
        return _rebuild, (self.what, self.where, self.fix, self.rows)


def _rebuild(what: str, where: str | None, fix: str | None, rows: list[dict[str, Any]]) -> RewardBudgetExceeded:
    return RewardBudgetExceeded(what, where=where, fix=fix, rows=rows)


def failure_rows(items: Sequence[tuple[str, dict[str, Any]]], scored: Sequence[ScoredSample]) -> list[dict[str, Any]]:
    """The failed ones of (response, task) pairs, each a row for a JSONL file.

    ``row`` is the sample's position in ``items``; ``error`` the kind of failure and ``message`` its words.
    """
    return [
        failure_row(position, response, task, sample)
        for position, ((response, task), sample) in enumerate(zip(items, scored, strict=True))
        if sample.failure is not None
    ]


def failure_row(position: int, response: str, task: dict[str, Any], sample: ScoredSample) -> dict[str, Any]:
    """One failed sample with the row that it failed on."""
    failure = sample.failure
    assert failure is not None
    return {
        "row": position,
        "prompt": task.get("prompt"),
        "response": response,
        "answer": task.get("answer"),
        "part": failure.part,
        "error": failure.kind,
        "message": failure.message,
    }


@dataclass(frozen=True)
class FailureBudget:
    """``max_rate``: the fraction of a step's samples that may fail (``reward.max_failure_rate``)."""

    max_rate: float

    def allows(self, failures: int, total: int) -> bool:
        """Whether ``failures`` of a step of ``total`` samples may be."""
        return total == 0 or failures / total <= self.max_rate

    def check(self, failures: Sequence[dict[str, Any]], total: int) -> None:
        """Holds a step against the budget.

        Args:
            failures: rows of :func:`failure_rows`.
            total: samples in the step.

        Raises:
            RewardBudgetExceeded: with the rate, the limit and the first failures.
        """
        if self.allows(len(failures), total):
            return
        shown = "\n".join(f"  {_describe(row)}" for row in failures[:_SHOWN])
        more = f"\n  … and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
        raise RewardBudgetExceeded(
            f"{len(failures)} of {total} samples ({len(failures) / total:.1%}) have no reward, "
            f"{self.max_rate:.1%} may:\n{shown}{more}",
            where="reward.max_failure_rate",
            fix="try the reward on these rows with `rlsys reward check`; if such rows are to be expected, "
            "raise reward.max_failure_rate (they score 0) or, for time-outs, reward.timeout_s",
            rows=failures,
        )


def reason(failure: Failure) -> str:
    """The one line of a failure's message that says most: a traceback's last, else the first."""
    lines = failure.message.strip().splitlines() or [""]
    return lines[-1 if failure.kind == "raised" else 0].strip()


def _describe(row: dict[str, Any]) -> str:
    why = reason(Failure(row["error"], row["part"], row["message"]))
    return f"row {row['row']}, part '{row['part']}', {row['error']}: {why:.160} (response: {row['response']!r:.60})"
