"""Advantage estimators: from rewards to advantages. One file each, of one of two kinds.

*Sample level*, run where the rewards of the whole batch are: ``(rewards [B] float, groups [B] int64, *, reads, options)
-> advantages [B] float32``. ``groups`` holds the prompt group of each sample as an index 0 … G-1; groups may have lost
samples and differ in size; a sample that is left alone gets 0 from an estimator that compares within groups. With
``@reads(…)`` (``rlsys.config.plugins``) it also gets, as keyword arguments:

- ``lengths`` [B] int64: sampled tokens of the response
- ``scores``: by reward part, [B] float64, NaN where the part was not computed; ``weights``: by reward part, float
- ``baselines`` [B] float64: reward of the greedy response to the sample's prompt

*Token level* (``@token_level``), run on every trainer rank, on the tokens that it holds: ``(token_rewards [N] float,
mask [N] bool, rows [N] int64, num_rows, collective, *, reads, options) -> TokenAdvantages``. ``token_rewards`` has the
sample's reward on its last sampled token, less any penalty a token. It may read ``values`` [N]: the critic's value of
the state before each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rlsys.algorithms.collective import Alone, Collective
from rlsys.algorithms.groups import centered, group_index, group_range, group_sizes
from rlsys.algorithms.returns import check_flat, spread_rewards
from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry, check_options, reads_of

__all__ = [
    "ADVANTAGES",
    "TokenAdvantages",
    "centered",
    "check_estimator",
    "compares_in_group",
    "estimate",
    "estimate_tokens",
    "estimator_reads",
    "group_index",
    "group_sizes",
    "is_token_level",
    "spread_rewards",
    "token_level",
    "try_out",
]


@dataclass(frozen=True)
class TokenAdvantages:
    """What a token-level estimator returns: advantages, returns [N] float32, 0 off the mask."""

    advantages: torch.Tensor
    returns: torch.Tensor


Estimator = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])
ADVANTAGES: Registry[Estimator] = Registry("advantage estimator", "rlsys.algorithms.advantages")

_SAMPLE_INPUTS = ("lengths", "scores", "weights", "baselines")
_TOKEN_INPUTS = ("values",)


def compares_in_group(function: F) -> F:
    """Decorator: it compares a sample with others of its group, so one sample per prompt teaches nothing."""
    function.compares_in_group = True  # type: ignore[attr-defined]
    return function


def token_level(estimator: F) -> F:
    """Decorator: the estimator wants tokens, not samples."""
    estimator.token_level = True  # type: ignore[attr-defined]
    return estimator


def is_token_level(name: str) -> bool:
    """Whether the estimator called ``name`` is run by :func:`estimate_tokens`, and not by :func:`estimate`."""
    return getattr(ADVANTAGES.get(name, where="algorithm.advantage"), "token_level", False)


def estimator_reads(name: str) -> tuple[str, ...]:
    """What the estimator called ``name`` reads besides rewards and groups."""
    return reads_of(ADVANTAGES.get(name, where="algorithm.advantage"))


def check_estimator(name: str, options: dict[str, Any], samples_per_prompt: int) -> None:
    """Refuses a configuration that cannot learn or that names unknown things; meant to run before anything starts.

    Raises:
        UserError: unknown estimator or option, an estimator that reads what nothing provides, or one that compares
            samples of a prompt with one sample per prompt.
    """
    estimator = ADVANTAGES.get(name, where="algorithm.advantage")
    check_options(estimator, options, where="algorithm.advantage_options")
    known = _TOKEN_INPUTS if is_token_level(name) else _SAMPLE_INPUTS
    if unknown := [read for read in reads_of(estimator) if read not in known]:
        raise UserError(
            f"'{name}' reads {', '.join(unknown)}, which nothing provides",
            where="algorithm.advantage",
            fix=f"{'a token-level' if is_token_level(name) else 'a sample-level'} estimator may read "
            + ", ".join(known),
        )
    if samples_per_prompt < 2 and getattr(estimator, "compares_in_group", False):
        raise UserError(
            f"'{name}' compares the samples of a prompt with each other, and there is one sample per prompt",
            where="rollout.samples_per_prompt",
            fix="set rollout.samples_per_prompt to 2 or more",
        )


def try_out(name: str, options: dict[str, Any]) -> torch.Tensor:
    """[2] float32: advantages of two made-up samples of one token each, with rewards 0 and 1, made-up inputs included.

    Raises:
        UserError: what the estimator says about its options.
    """
    rewards, rows = torch.tensor([0.0, 1.0]), torch.arange(2)
    if is_token_level(name):
        inputs: dict[str, Any] = {read: torch.zeros(2) for read in estimator_reads(name)}
        mask = torch.ones(2, dtype=torch.bool)
        return estimate_tokens(name, rewards, mask, rows, 2, Alone(), inputs=inputs, **options).advantages
    inputs = {
        "lengths": torch.ones(2, dtype=torch.int64),
        "scores": {"reward": rewards.to(torch.float64)},
        "weights": {"reward": 1.0},
        "baselines": torch.zeros(2, dtype=torch.float64),
    }
    return estimate(name, rewards, ["a", "a"], inputs=inputs, **options)[0]


def estimate(
    name: str, rewards: torch.Tensor, uids: Sequence[str], *, inputs: Mapping[str, Any] | None = None, **options: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages of a batch by the sample-level estimator called ``name``.

    Args:
        rewards: [B].
        uids: prompt-group id of each sample.
        inputs: ``lengths``, ``scores``, ``weights``, ``baselines``, those that the estimator reads; None counts
            as missing.
        options: of the estimator.

    Returns:
        advantages [B] float32; metrics: ``groups``, ``groups_of_one`` (shrunk by drops: their advantage is 0) and
        ``groups_without_signal`` (fraction of groups all of whose rewards are equal).

    Raises:
        UserError: unknown estimator or option, or a token-level estimator.
        ValueError: something does not have one value a sample or is not finite, or an input is missing.
    """
    estimator = ADVANTAGES.get(name, where="algorithm.advantage")
    check_options(estimator, options, where="algorithm.advantage_options")
    if is_token_level(name):
        raise UserError(
            f"'{name}' gives every token its own advantage, and there are only samples here",
            where="algorithm.advantage",
            fix="call estimate_tokens",
        )
    _check_samples("rewards", rewards, len(uids))
    given = _given(name, estimator, inputs)
    for read, value in given.items():
        if read == "scores":
            for part, scores in value.items():
                _check_samples(f"scores of '{part}'", scores, len(uids), nan=True)
        elif read != "weights":
            _check_samples(read, value, len(uids))
    if "scores" in given and given["scores"].keys() != given.get("weights", given["scores"]).keys():
        raise ValueError(f"scores of {sorted(given['scores'])} beside weights of {sorted(given['weights'])}")
    if not len(uids):
        return rewards.to(torch.float32), {"groups": 0.0, "groups_of_one": 0.0, "groups_without_signal": 0.0}
    groups = group_index(uids)
    sizes = torch.bincount(groups)
    metrics = {
        "groups": float(len(sizes)),
        "groups_of_one": float((sizes == 1).sum()),
        "groups_without_signal": float((group_range(rewards, groups) == 0).to(torch.float64).mean()),
    }
    return estimator(rewards, groups, **given, **options), metrics


def estimate_tokens(
    name: str,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    collective: Collective,
    *,
    token_penalty: torch.Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> TokenAdvantages:
    """Advantages and returns of this rank's tokens by the token-level estimator called ``name``.

    Every rank calls it at the same time, also one without rows.

    Args:
        rewards: [B] of this rank's rows.
        mask: [N] bool, the sampled tokens of its rows, laid end to end.
        rows: [N] int64, row of each token, never falling.
        num_rows: B.
        token_penalty: [N], taken off the reward of each sampled token.
        inputs: ``values`` [N], if the estimator reads it.
        options: of the estimator.

    Raises:
        UserError: unknown estimator or option, or a sample-level estimator.
        ValueError: shapes disagree, a reward or value is not finite, or an input is missing.
    """
    estimator = ADVANTAGES.get(name, where="algorithm.advantage")
    check_options(estimator, options, where="algorithm.advantage_options")
    if not is_token_level(name):
        raise UserError(
            f"'{name}' gives every sample one advantage, and not every token its own",
            where="algorithm.advantage",
            fix="call estimate",
        )
    _check_samples("rewards", rewards, num_rows)
    given = _given(name, estimator, inputs)
    check_flat(mask, rows, **given)
    for read, value in given.items():
        if not torch.isfinite(value[mask]).all():
            raise ValueError(f"{read} of sampled tokens are not finite")
    token_rewards = spread_rewards(rewards, mask, rows, num_rows, token_penalty)
    return estimator(token_rewards, mask, rows, num_rows, collective, **given, **options)


def _given(name: str, estimator: Estimator, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the estimator reads, and no more."""
    inputs = {read: value for read, value in (inputs or {}).items() if value is not None}
    if missing := [read for read in reads_of(estimator) if read not in inputs]:
        raise ValueError(f"'{name}' reads {', '.join(missing)}; given: {', '.join(inputs) or 'nothing'}")
    return {read: inputs[read] for read in reads_of(estimator)}


def _check_samples(name: str, values: torch.Tensor, samples: int, *, nan: bool = False) -> None:
    if values.shape != (samples,):
        raise ValueError(f"{samples} samples have {name} of shape {tuple(values.shape)}")
    bad = values.isinf() if nan else ~torch.isfinite(values)
    if bad.any():
        raise ValueError(f"{name} of samples {torch.nonzero(bad).flatten().tolist()} are not finite")
