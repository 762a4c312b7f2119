"""Rollout corrections, for the distance between the trainer's π_old and the sampler's μ. One file each.

A correction is a function ``(old_logprobs, rollout_logprobs, mask, rows, num_rows, *, options) -> Correction`` on the
response tokens of a batch of whole rows, laid end to end. With r = π_old/μ it weighs token losses by r (importance
sampling) or leaves out tokens and rows that are too far off (masks). Nothing here carries a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry, check_options

SumCount = tuple[Tensor, Tensor]

_WHERE = "algorithm.correction"
# Each of these is the importance weight, more or less bounded: two of them would count the ratio twice.
_WEIGHTS = frozenset({"tis_token", "tis_sequence", "icepop"})


@dataclass(frozen=True)
class Correction:
    """What a correction makes of a batch.

    weights: [N] float, factor of each token's loss, without gradient; 0 off the mask.
    keep: [N] bool, tokens that stay in the loss; false off the mask. A token of weight 0 may still be kept: whoever
        leaves out what is not kept may also leave it out of the normaliser, which a weight never touches.
    sums: by name, (sum, count) of a metric.
    """

    weights: Tensor
    keep: Tensor
    sums: dict[str, SumCount] = field(default_factory=dict)


CorrectionFunction = Callable[..., Correction]
CORRECTIONS: Registry[CorrectionFunction] = Registry("rollout correction", "rlsys.algorithms.corrections")


def apply_corrections(
    corrections: dict[str, dict[str, Any]],
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    rows: Tensor,
    num_rows: int,
) -> Correction:
    """All of them, each on the whole mask: weights are multiplied, and a token is kept if each keeps it.

    Args:
        corrections: options by name (or import path), as in ``algorithm.correction``; empty: weights of 1.
        old_logprobs, rollout_logprobs: [N] log π_old and log μ of the sampled tokens, in nats; anything off the mask.
        mask: [N] bool. rows: [N] int64, the row of each token; rows are whole. num_rows: B.

    Returns:
        Correction; its metrics are named ``<correction>_<metric>``.

    Raises:
        UserError: there is no such correction, or an option is out of its range.
        ValueError: shapes disagree.
    """
    for name, other in (("rollout_logprobs", rollout_logprobs), ("mask", mask), ("rows", rows)):
        if other.shape != old_logprobs.shape:
            raise ValueError(f"old_logprobs have the shape {tuple(old_logprobs.shape)}, {name} {tuple(other.shape)}")
    old_logprobs, rollout_logprobs = old_logprobs.detach(), rollout_logprobs.detach()
    weights, keep = mask.to(old_logprobs.dtype), mask
    sums: dict[str, SumCount] = {}
    for name, options in corrections.items():
        function = CORRECTIONS.get(name, where=f"{_WHERE}.{name}")
        found = function(old_logprobs, rollout_logprobs, mask, rows, num_rows, **options)
        weights, keep = weights * found.weights, keep & found.keep
        sums |= {f"{name}_{metric}": pair for metric, pair in found.sums.items()}
    return Correction(weights, keep, sums)


def check_corrections(corrections: dict[str, dict[str, Any]], bypass: bool) -> None:
    """``algorithm.correction`` before a run: names, options (by a call on no tokens), and whether it can do anything.

    Args:
        corrections: options by name.
        bypass: π_old is the sampler's μ (``algorithm.old_logprobs=sampler``).

    Raises:
        UserError: an unknown name or option, a value out of range, two importance weights, or a bypass: the ratio that
            would be corrected for is then 1 on every token.
    """
    if corrections and bypass:
        raise UserError(
            f"the correction '{next(iter(corrections))}' would have no effect: with π_old = μ the ratio is 1",
            where=_WHERE,
            fix="set algorithm.old_logprobs=trainer, or leave corrections out",
        )
    for name, options in corrections.items():
        function = CORRECTIONS.get(name, where=f"{_WHERE}.{name}")
        check_options(function, options, where=f"{_WHERE}.{name}")
        for parameter in inspect.signature(function).parameters.values():
            needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
            if needed and parameter.name not in options:
                raise UserError(
                    f"the correction '{name}' needs the option '{parameter.name}'",
                    where=f"{_WHERE}.{name}.{parameter.name}",
                )
    weighing = [name for name in corrections if name in _WEIGHTS]
    if len(weighing) > 1:
        raise UserError(
            f"{' and '.join(weighing)} each weigh tokens by π_old/μ, which together would count it twice",
            where=_WHERE,
            fix="choose one; masks (sequence_mask, reject, veto) go with any",
        )
    nothing, rows = torch.empty(0), torch.empty(0, dtype=torch.int64)
    apply_corrections(corrections, nothing, nothing, torch.empty(0, dtype=torch.bool), rows, 0)


def require_bounds(correction: str, low: float, high: float) -> None:
    """Raises:
    UserError: not 0 ≤ low ≤ 1 ≤ high: a token on which sampler and trainer agree would be left out.
    """
    if not 0 <= low <= 1 <= high:
        raise UserError(
            f"the ratio 1 does not lie within [{low}, {high}]",
            where=f"{_WHERE}.{correction}.{'high' if 0 <= low <= 1 else 'low'}",
            fix="choose 0 ≤ low ≤ 1 ≤ high",
        )


def require_positive(correction: str, **options: float) -> None:
    """Raises:
    UserError: an option is not more than 0.
    """
    for name, value in options.items():
        if not value > 0:
            raise UserError(f"{name} must be more than 0, not {value}", where=f"{_WHERE}.{correction}.{name}")
