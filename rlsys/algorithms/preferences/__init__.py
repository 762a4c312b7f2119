"""Preference losses: from the log-probs of a chosen and a rejected response to one loss a pair. One file each.

A preference loss is a function ``(chosen: PairLogprobs, rejected: PairLogprobs, *, options) -> PreferenceLoss``. It
returns no mean: the channel divides by the pairs of the global batch. One that does not read the reference says so with
:func:`without_reference`, and then no reference is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rlsys.algorithms.aggregation import live_rows, row_sum
from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry


@dataclass(frozen=True)
class PairLogprobs:
    """One side of P pairs; P may be 0.

    policy: [P] log π of the response, summed over its tokens, with gradient.
    reference: [P] the same of the reference, without gradient; None: there is none.
    lengths: [P] int64, tokens of the response that are summed over.
    """

    policy: torch.Tensor
    reference: torch.Tensor | None
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        for name, other in (("reference", self.reference), ("lengths", self.lengths)):
            if other is not None and other.shape != self.policy.shape:
                raise ValueError(f"{name} {tuple(other.shape)} beside log-probs {tuple(self.policy.shape)}")

    @property
    def log_ratio(self) -> torch.Tensor:
        """[P] log π − log π_ref.

        Raises:
            ValueError: there is no reference.
        """
        if self.reference is None:
            raise ValueError("the preference loss reads the reference's log-probs, and there are none")
        return self.policy - self.reference

    def a_token(self, sums: torch.Tensor) -> torch.Tensor:
        """[P] sums over a response, divided by its length."""
        return sums / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class PreferenceLoss:
    """What a preference loss returns.

    pairs: [P] loss of each pair, with gradient.
    margin: [P] by how much the policy prefers the chosen response, in the loss's own sense; > 0: it does.
    sums: by name, (sum, count) of a metric, without gradient; the same names whatever the data.
    """

    pairs: torch.Tensor
    margin: torch.Tensor
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


PreferenceLossFunction = Callable[..., PreferenceLoss]
PREFERENCE_LOSSES: Registry[Any] = Registry("preference loss", "rlsys.algorithms.preferences")


def without_reference(loss: PreferenceLossFunction) -> PreferenceLossFunction:
    """Decorator: the loss reads no reference log-probs."""
    loss.needs_reference = False  # type: ignore[attr-defined]
    return loss


def with_reference(loss: PreferenceLossFunction) -> PreferenceLossFunction:
    """Decorator: the loss reads the reference's log-probs, which is also what holds for a plain function."""
    loss.needs_reference = True  # type: ignore[attr-defined]
    return loss


def pair_sums(
    token_logprobs: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of each row's log-probs, and how many there are.

    Args:
        token_logprobs: [N], with or without gradient. What stands off the mask has no effect, even if it is not finite.
        mask: [N] bool. rows: [N] int64, row of each token. num_rows: P.

    Returns:
        sums [P] in the log-probs' dtype; lengths [P] int64.

    Raises:
        ValueError: shapes that differ.
    """
    for name, other in (("mask", mask), ("rows", rows)):
        if other.shape != token_logprobs.shape:
            raise ValueError(f"{name} {tuple(other.shape)} beside log-probs {tuple(token_logprobs.shape)}")
    return row_sum(token_logprobs, mask, rows, num_rows), live_rows(mask, rows, num_rows)


def require(condition: bool, option: str, what: str) -> None:
    """Raises UserError at ``algorithm.preference.loss_options.OPTION`` unless the condition holds."""
    if not condition:
        raise UserError(what, where=f"algorithm.preference.loss_options.{option}")


def check_sides(chosen: PairLogprobs, rejected: PairLogprobs) -> None:
    """Raises ValueError where the sides are not of the same pairs."""
    if chosen.policy.shape != rejected.policy.shape:
        raise ValueError(f"{tuple(chosen.policy.shape)} chosen and {tuple(rejected.policy.shape)} rejected responses")
