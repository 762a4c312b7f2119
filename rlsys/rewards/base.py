"""What a reward function is.

A reward function scores one response, in a worker process, within a time limit::

    def brevity(response: str, task: dict, *, limit: int = 200) -> float:
        return 1.0 if len(response) <= limit else 0.0

- ``response``: the sampled text.
- ``task``: ``prompt`` (text), ``answer`` and the row's other fields; where the response comes from a rollout also
  ``response_tokens`` (sampled and given tokens after the prompt) and ``finish_reason``.
- Options are keyword-only. Their names, and their types where they are annotated, are checked before a run starts.
- It returns a finite number, or a :class:`RewardResult`. Anything else, and any exception, is a *failure*: it is
  recorded with the row and counted against ``reward.max_failure_rate``. A response that is merely wrong scores 0 and is
  no failure.

The import path of such a function (``my_rewards.brevity``) works wherever a name does. One that ships with rlsys is a
file in this package with ``@REWARDS.register("name")``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeVar

from rlsys.config.plugins import Registry

RewardFunction = Callable[..., Any]
REWARDS: Registry[RewardFunction] = Registry("reward", "rlsys.rewards")

FailureKind = Literal["raised", "timeout", "crashed", "bad value"]
F = TypeVar("F", bound=RewardFunction)


@dataclass(frozen=True)
class RewardResult:
    """A score with words about it.

    score: finite.
    feedback: what is wrong (or good), for people and for teacher contexts; must not give the answer away.
    info: anything worth keeping with the rollout, as JSON values.
    """

    score: float
    feedback: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a part has no score.

    kind: ``raised`` an exception, ran into the ``timeout``, ``crashed`` its process, or returned a ``bad value``.
    part: name of the part.
    message: what happened, with the end of the traceback where there is one.
    """

    kind: FailureKind
    part: str
    message: str


@dataclass(frozen=True)
class Hooks:
    """What a reward function wants done before its first call.

    needs: fields of ``task`` that it reads.
    check: called with the options where the run is built; raises UserError whose ``where`` is the option's name.
    warm_up: called once in each worker process, outside of the time limit; the place for slow imports.
    """

    needs: tuple[str, ...] = ()
    check: Callable[..., None] | None = None
    warm_up: Callable[[], None] | None = None


def hooks(
    *,
    needs: tuple[str, ...] = (),
    check: Callable[..., None] | None = None,
    warm_up: Callable[[], None] | None = None,
) -> Callable[[F], F]:
    """Decorator: attach :class:`Hooks` to a reward function."""

    def attach(function: F) -> F:
        function.__reward_hooks__ = Hooks(needs, check, warm_up)  # type: ignore[attr-defined]
        return function

    return attach


def hooks_of(function: RewardFunction) -> Hooks:
    """The hooks of a reward function; of a plain one, none."""
    found = getattr(function, "__reward_hooks__", None)
    return found if isinstance(found, Hooks) else Hooks()


def as_result(value: Any) -> RewardResult:
    """What a reward function returned, as a result whose score is a plain finite float.

    Raises:
        ValueError, TypeError: it is no score, or its info is no JSON; the message says what it is instead.
    """
    result = value if isinstance(value, RewardResult) else RewardResult(value)
    if not isinstance(result.score, Real):
        shown = "nothing (None)" if result.score is None else f"{type(result.score).__name__} {result.score!r:.80}"
        raise ValueError(f"returned {shown} instead of a number")
    score = float(result.score)
    if not math.isfinite(score):
        raise ValueError(f"returned {score}, which is no score")
    if result.feedback is not None and not isinstance(result.feedback, str):
        raise ValueError(f"returned feedback of type {type(result.feedback).__name__} instead of text")
    info = json.loads(json.dumps(result.info, allow_nan=False)) if result.info else {}
    return RewardResult(score, result.feedback, info)
