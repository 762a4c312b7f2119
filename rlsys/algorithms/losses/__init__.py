"""Policy losses: per-token losses, and metrics as sums and counts. One file each.

A policy loss is a function ``(logprobs, old_logprobs, advantages, mask, *, options) -> PolicyLoss``. Tensors are [N],
one value a response token of all rows laid end to end; ``mask`` is true on the tokens that count. It returns no mean:
the aggregation weighs tokens, over the global batch.

With :func:`rlsys.config.plugins.reads` it may ask for more, as keyword arguments:

- ``rows`` [N] int64, the row of each token, and ``num_rows`` int (rows are whole);
- ``rollout_logprobs`` [N], the sampler's log μ; ``ref_logprobs`` [N], the reference's;
- ``prepared`` dict of [N] tensors: what its :func:`prepares` function made of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rlsys.algorithms.aggregation import Aggregation
from rlsys.algorithms.collective import Alone
from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry, check_options, reads_of


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy loss returns.

    tokens: loss of each token, 0 off the mask, in the inputs' shape; carries the gradient.
    sums: by name, (sum, count) of a metric, without gradient.
    maxima: by name, the largest value of a metric, without gradient.
    """

    tokens: torch.Tensor
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


PolicyLossFunction = Callable[..., PolicyLoss]
Prepare = Callable[..., dict[str, torch.Tensor]]
POLICY_LOSSES: Registry[PolicyLossFunction] = Registry("policy loss", "rlsys.algorithms.losses")


def prepares(prepare: Prepare) -> Callable[[PolicyLossFunction], PolicyLossFunction]:
    """Decorator: what the loss needs to know of the whole batch, such as which tokens are extreme in it.

    Args:
        prepare: ``(old_logprobs [N], advantages [N], mask [N], collective, *, options) -> dict of [N] tensors``, called
            with all rows of a rank (N may be 0) and with the loss's own options, on every rank, before the first
            micro-batch. Each micro-batch is given its tokens' part as ``prepared``.
    """

    def attach(loss: PolicyLossFunction) -> PolicyLossFunction:
        loss.prepare = prepare  # type: ignore[attr-defined]
        return loss

    return attach


def prepare_of(loss: PolicyLossFunction) -> Prepare | None:
    """The function that :func:`prepares` attached; None: the loss looks at no more than its micro-batch."""
    return getattr(loss, "prepare", None)


def aggregated(aggregation: Aggregation) -> Callable[[PolicyLossFunction], PolicyLossFunction]:
    """Decorator: the loss is defined with this aggregation, and is another loss with any other."""

    def attach(loss: PolicyLossFunction) -> PolicyLossFunction:
        loss.aggregation = aggregation  # type: ignore[attr-defined]
        return loss

    return attach


def aggregation_of(loss: PolicyLossFunction) -> Aggregation | None:
    """The aggregation that :func:`aggregated` fixed; None: any."""
    return getattr(loss, "aggregation", None)


def check_loss(name: str, options: dict[str, Any]) -> PolicyLossFunction:
    """The policy loss of this name or import path, with its options checked: names, types, and (by a call on no tokens)
    values.

    Raises:
        UserError: there is no such loss, or an option is unknown, missing, of the wrong type or out of its range.
    """
    where = "algorithm.loss_options"
    loss = POLICY_LOSSES.get(name, where="algorithm.loss")
    check_options(loss, options, where=where)
    wanted = reads_of(loss)
    for parameter in inspect.signature(loss).parameters.values():
        needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if needed and parameter.name not in (*options, *wanted):
            raise UserError(
                f"the policy loss '{name}' needs the option '{parameter.name}'", where=f"{where}.{parameter.name}"
            )
    prepare, nobody = prepare_of(loss), Alone()
    given = {
        "rows": torch.empty(0, dtype=torch.int64),
        "num_rows": 0,
        "rollout_logprobs": torch.empty(0),
        "ref_logprobs": torch.empty(0),
        "prepared": prepare(*_no_tokens(), nobody, **options) if prepare else {},
    }
    if unknown := [read for read in wanted if read not in given]:
        raise UserError(
            f"the policy loss '{name}' reads '{unknown[0]}', which no policy loss is given",
            where="algorithm.loss",
            fix=f"it may read {', '.join(given)}",
        )
    loss(torch.empty(0), *_no_tokens(), **{read: given[read] for read in wanted}, **options)
    return loss


def _no_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """old_logprobs, advantages, mask."""
    return torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool)
