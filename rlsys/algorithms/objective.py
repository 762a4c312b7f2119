"""The loss as a weighted sum of channels, each of which returns sums and counts and never a mean.

The normaliser of a channel is fixed over the global batch before the first micro-batch, so the gradient is the same
however the batch is cut into micro-batches or spread over ranks:

    loss = Σ_channels weight · (Σ_micro-batches Σ_ranks loss_sum) / normaliser
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from rlsys.algorithms.aggregation import Aggregation, live_rows, normaliser, token_weights
from rlsys.algorithms.kl import KLEstimator, kl_estimate
from rlsys.algorithms.losses import POLICY_LOSSES
from rlsys.algorithms.mismatch import mismatch_sums
from rlsys.config.plugins import check_options
from rlsys.config.schema import AlgorithmConfig

SumCount = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ResponseBatch:
    """Rows of a batch with their response tokens laid end to end.

    columns: by name; a ``[B, j:response]`` column is [N], one value a response token; a ``[B]`` column is [B].
    rows: [N] int64, the row that each response token belongs to.
    num_rows: B. Both B and N may be 0: a rank that has run out of rows still takes part in every collective.
    """

    columns: dict[str, torch.Tensor]
    rows: torch.Tensor
    num_rows: int


@dataclass(frozen=True)
class ForwardOutput:
    """logprobs [N], with gradient; entropy [N], with gradient where a channel asks for it; 0 off ``response_mask``."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class ChannelSums:
    """loss_sum: scalar with gradient, not normalised; sums: metrics as (sum, count); maxima: reduced by maximum."""

    loss_sum: torch.Tensor
    sums: dict[str, SumCount] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


class Channel(Protocol):
    """One term of the loss.

    reads: the batch's columns that it needs.
    entropy_gradient: whether the entropy that it is given must carry a gradient.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def entropy_gradient(self) -> bool: ...

    def normaliser(self, batch: ResponseBatch) -> float | None:
        """What this rank's rows add to the number that the loss is divided by; None: the sum is the loss."""
        ...

    def loss(self, batch: ResponseBatch, output: ForwardOutput) -> ChannelSums:
        """Sums over one micro-batch, of whole rows. Metric names must not depend on the data."""
        ...


@dataclass(frozen=True)
class ObjectiveSums:
    """What one micro-batch adds. loss: scalar with gradient, normalised; totals: metrics that are added up; sums and
    maxima: as in ChannelSums, names prefixed by the channel's."""

    loss: torch.Tensor
    totals: dict[str, torch.Tensor]
    sums: dict[str, SumCount]
    maxima: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """channels: by name, (channel, its weight in the loss). A channel of weight 0 is not computed."""

    channels: dict[str, tuple[Channel, float]]

    def __post_init__(self) -> None:
        if not any(weight for _, weight in self.channels.values()):
            raise ValueError("an objective needs a channel with non-zero weight")

    @property
    def live(self) -> dict[str, tuple[Channel, float]]:
        return {name: pair for name, pair in self.channels.items() if pair[1]}

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that any channel reads, each once."""
        return tuple(dict.fromkeys(column for channel, _ in self.live.values() for column in channel.reads))

    @property
    def entropy_gradient(self) -> bool:
        return any(channel.entropy_gradient for channel, _ in self.live.values())

    def normalisers(self, batch: ResponseBatch) -> dict[str, float | None]:
        """This rank's part of each channel's normaliser; the engine sums them over ranks."""
        return {name: channel.normaliser(batch) for name, (channel, _) in self.live.items()}

    def loss(self, batch: ResponseBatch, output: ForwardOutput, normalisers: dict[str, float | None]) -> ObjectiveSums:
        """Loss and metrics of one micro-batch.

        Args:
            normalisers: over the global batch. A channel whose normaliser is 0 has no token anywhere and adds 0.
        """
        loss = output.logprobs.new_zeros(())
        totals: dict[str, torch.Tensor] = {}
        sums: dict[str, SumCount] = {}
        maxima: dict[str, torch.Tensor] = {}
        for name, (channel, weight) in self.live.items():
            result = channel.loss(batch, output)
            total = normalisers[name]
            term = result.loss_sum if total is None else result.loss_sum / max(total, 1.0)
            loss = loss + weight * term
            totals[f"{name}/loss"] = term.detach()
            sums |= {f"{name}/{key}": value for key, value in result.sums.items()}
            maxima |= {f"{name}/{key}": value for key, value in result.maxima.items()}
        totals["loss"] = loss.detach()
        return ObjectiveSums(loss, totals, sums, maxima)


def _live_fraction(mask: torch.Tensor, batch: ResponseBatch) -> SumCount:
    """(rows that the channel saw a token of, rows)."""
    live = (live_rows(mask, batch.rows, batch.num_rows) > 0).sum()
    return live, torch.full_like(live, batch.num_rows)


@dataclass(frozen=True)
class PolicyGradient:
    """Policy-gradient loss on sampled tokens, with an optional KL to the reference and an entropy bonus:

        policy loss + kl_coef · KL(π ‖ π_ref) − entropy_coef · entropy

    loss_name, loss_options: name or import path of a policy loss, and its options.
    aggregation: how tokens are weighed.
    horizon: the longest response allowed, which ``seq-mean-token-sum-norm`` divides by.
    kl_coef, kl_estimator, entropy_coef: weights of the other two terms, and how the KL is estimated.
    old_logprobs: where π_old comes from: the ``column`` of that name, or ``self``: π itself without gradient. That is
        the same value and the same gradient as long as the batch is used for exactly one optimiser step, and it saves
        a forward pass.
    mismatch: also report how far π is from the sampler's μ on the sampled tokens; reads ``rollout_logprobs``.
    """

    loss_name: str = "ppo_clip"
    loss_options: dict[str, Any] = field(default_factory=dict)
    aggregation: Aggregation = "token-mean"
    horizon: int | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    old_logprobs: Literal["column", "self"] = "column"
    mismatch: bool = False

    def __post_init__(self) -> None:
        function = POLICY_LOSSES.get(self.loss_name, where="algorithm.loss")
        check_options(function, self.loss_options, where="algorithm.loss_options")
        if self.aggregation == "seq-mean-token-sum-norm" and not self.horizon:
            raise ValueError("seq-mean-token-sum-norm needs a horizon: the longest response allowed")

    @classmethod
    def from_config(
        cls, config: AlgorithmConfig, *, horizon: int, old_logprobs: Literal["column", "self"], mismatch: bool = False
    ) -> PolicyGradient:
        """The channel that ``algorithm.*`` describes; horizon: ``data.max_response_tokens``."""
        return cls(
            loss_name=config.loss,
            loss_options=config.loss_options,
            aggregation=config.aggregation,
            horizon=horizon,
            kl_coef=config.kl.coef if config.kl.placement == "loss" else 0.0,
            kl_estimator=config.kl.estimator,
            entropy_coef=config.entropy_coef,
            old_logprobs=old_logprobs,
            mismatch=mismatch,
        )

    @property
    def reads(self) -> tuple[str, ...]:
        old = ("old_logprobs",) if self.old_logprobs == "column" else ()
        reference = ("ref_logprobs",) if self.kl_coef else ()
        sampler = ("rollout_logprobs",) if self.mismatch else ()
        return ("response_mask", "advantages", *old, *reference, *sampler)

    @property
    def entropy_gradient(self) -> bool:
        return self.entropy_coef != 0

    def normaliser(self, batch: ResponseBatch) -> float | None:
        return normaliser(self.aggregation, batch.columns["response_mask"], batch.rows, batch.num_rows)

    def loss(self, batch: ResponseBatch, output: ForwardOutput) -> ChannelSums:
        mask = batch.columns["response_mask"]
        old = batch.columns["old_logprobs"] if self.old_logprobs == "column" else output.logprobs.detach()
        function = POLICY_LOSSES.get(self.loss_name, where="algorithm.loss")
        policy = function(output.logprobs, old, batch.columns["advantages"], mask, **self.loss_options)
        tokens, count = policy.tokens, mask.sum()
        sums = {**policy.sums, "entropy": (output.entropy.detach()[mask].sum(), count)}
        if self.kl_coef:
            # Both sides are made equal off the mask first: there 0 · inf would be a NaN in the gradient.
            reference = torch.where(mask, batch.columns["ref_logprobs"], 0.0)
            kl = kl_estimate(torch.where(mask, output.logprobs, 0.0), reference, self.kl_estimator)
            tokens = tokens + self.kl_coef * kl
            sums["kl"] = (kl.detach().sum(), count)
        if self.entropy_coef:
            tokens = tokens - self.entropy_coef * output.entropy
        maxima = policy.maxima
        if self.mismatch:
            off = mismatch_sums(output.logprobs.detach(), batch.columns["rollout_logprobs"], mask)
            sums |= {"mismatch_abs_mean": (off.absolute, count), "mismatch_kl": (off.k3, count)}
            maxima = maxima | {"mismatch_abs_max": off.largest}
        weights = token_weights(self.aggregation, mask, batch.rows, batch.num_rows, self.horizon)
        sums["live_fraction"] = _live_fraction(mask, batch)
        return ChannelSums((tokens * weights).sum(), sums, maxima)


@dataclass(frozen=True)
class CrossEntropy:
    """−log π of the response tokens, for supervised training. The engine divides logits by its temperature, which is 1
    for supervised training."""

    aggregation: Aggregation = "token-mean"
    horizon: int | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return ("response_mask",)

    @property
    def entropy_gradient(self) -> bool:
        return False

    def normaliser(self, batch: ResponseBatch) -> float | None:
        return normaliser(self.aggregation, batch.columns["response_mask"], batch.rows, batch.num_rows)

    def loss(self, batch: ResponseBatch, output: ForwardOutput) -> ChannelSums:
        mask = batch.columns["response_mask"]
        weights = token_weights(self.aggregation, mask, batch.rows, batch.num_rows, self.horizon)
        sums = {
            "entropy": (output.entropy.detach()[mask].sum(), mask.sum()),
            "live_fraction": _live_fraction(mask, batch),
        }
        return ChannelSums(-(output.logprobs * weights).sum(), sums)
