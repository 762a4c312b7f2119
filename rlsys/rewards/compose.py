"""reward = Σ weight · part: the parts of a configured reward, checked before anything runs, and their weighted sum."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.config.errors import UserError
from rlsys.config.plugins import check_options
from rlsys.rewards.base import REWARDS, Failure, RewardFunction, RewardResult, hooks_of
from rlsys.rewards.conditions import Condition, parse_condition

if TYPE_CHECKING:
    from rlsys.config.schema import RewardPart

_SIGNATURE = "def my_reward(response: str, task: dict, *, option=default) -> float"


@dataclass(frozen=True)
class Part:
    """One checked term of the reward.

    path: ``module:name`` of the function, for the worker processes, which import it themselves.
    """

    name: str
    path: str
    function: RewardFunction
    args: dict[str, Any]
    weight: float
    when: Condition | None


@dataclass(frozen=True)
class ScoredSample:
    """What the reward stage says about one sample.

    reward: Σ weight · score; 0 for a sample with a failure.
    scores: by part, in order; None where its condition did not hold, or after a failure.
    feedback: what the parts say, one a line.
    info: what the parts gave with their results, by part.
    failure: why the sample has no reward; None: it has one.
    """

    reward: float
    scores: dict[str, float | None]
    feedback: str | None
    info: dict[str, dict[str, Any]]
    failure: Failure | None


def build_parts(parts: Mapping[str, RewardPart], *, where: str = "reward.parts") -> list[Part]:
    """Imports and checks every part.

    Args:
        where: config key of the parts, for error messages.

    Raises:
        UserError: a function that is not found or not of the contract's form, an option that it does not take or that
            has the wrong type, or a condition that is malformed or speaks of a part that is not computed before.
    """
    if not parts:
        raise UserError("the reward has no parts", where=where, fix="choose a reward group, such as reward=gsm8k")
    names = list(parts)
    built = []
    for position, (name, part) in enumerate(parts.items()):
        key = f"{where}.{name}"
        function, path = load_function(part.use, part.args, where=f"{key}.use", where_args=f"{key}.args")
        when = None
        if part.when is not None:
            when = parse_condition(part.when, names[:position], names[position:], where=f"{key}.when")
        built.append(Part(name, path, function, dict(part.args), part.weight, when))
    return built


def load_function(use: str, args: Mapping[str, Any], *, where: str, where_args: str) -> tuple[RewardFunction, str]:
    """A reward function by name or import path, with its options checked.

    Returns:
        the function, and the ``module:name`` that another process finds it at.

    Raises:
        UserError: see :func:`build_parts`; ``where`` is the key of the name, ``where_args`` of the options.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a file beside the user counts, whichever way rlsys was started
    try:
        function = REWARDS.get(use, where=where)
    except UserError:
        raise
    except Exception as error:  # whatever the user's module does while it is imported
        raise UserError(f"importing the reward '{use}' failed: {type(error).__name__}: {error}", where=where) from error
    _check_form(function, use, where)
    _check_arguments(function, use, dict(args), where, where_args)
    named = "." not in use and ":" not in use
    if named and function.__module__ == "__main__":
        raise UserError(
            f"the reward '{use}' is defined in the program itself, where worker processes do not find it",
            where=where,
            fix="move it into a module of its own",
        )
    return function, f"{function.__module__}:{function.__qualname__}" if named else use


def _check_form(function: Any, use: str, where: str) -> None:
    if not callable(function) or inspect.isclass(function):
        raise UserError(
            f"'{use}' is a {type(function).__name__}, not a function", where=where, fix=f"write {_SIGNATURE}"
        )
    if inspect.iscoroutinefunction(function):
        raise UserError(
            f"'{use}' is an async function", where=where, fix=f"rewards run in processes: write {_SIGNATURE}"
        )


def _check_arguments(function: RewardFunction, use: str, args: dict[str, Any], where: str, where_args: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C, without a signature: its first call says what is wrong
    check_options(function, args, where=where_args)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name not in args:
            raise UserError(
                f"'{use}' needs the option '{name}'", where=f"{where_args}.{name}", fix=f"set {where_args}.{name}=…"
            )
    try:
        signature.bind("", {}, **args)
    except TypeError as error:
        raise UserError(
            f"'{use}' cannot be called as a reward: {error}", where=where, fix=f"write {_SIGNATURE}"
        ) from None
    check = hooks_of(function).check
    if check is not None:
        try:
            check(**args)
        except UserError as error:
            raise UserError(error.what, where=f"{where_args}.{error.where}", fix=error.fix) from None


def combine(parts: Sequence[Part], outcomes: Mapping[str, RewardResult | Failure]) -> ScoredSample:
    """The weighted sum over the parts that were computed."""
    results = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, RewardResult)}
    failure = next((outcome for outcome in outcomes.values() if isinstance(outcome, Failure)), None)
    reward = 0.0 if failure else sum(p.weight * results[p.name].score for p in parts if p.name in results)
    feedback = [result.feedback for result in results.values() if result.feedback]
    return ScoredSample(
        reward=reward,
        scores={p.name: results[p.name].score if p.name in results else None for p in parts},
        feedback="\n".join(feedback) or None,
        info={name: result.info for name, result in results.items() if result.info},
        failure=failure,
    )
