"""The policy gradient: a policy loss on sampled tokens, a KL to the reference, an entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rlsys.algorithms.aggregation import Aggregation, normaliser, token_weights
from rlsys.algorithms.collective import Collective
from rlsys.algorithms.corrections import Correction, apply_corrections
from rlsys.algorithms.entropy import above_quantile
from rlsys.algorithms.kl import KLEstimator, corrected, kl_estimate
from rlsys.algorithms.losses import POLICY_LOSSES, check_loss, prepare_of
from rlsys.algorithms.mismatch import mismatch_sums
from rlsys.algorithms.objective import (
    ChannelSums,
    DivergencePass,
    ForwardOutput,
    Prepared,
    ResponseBatch,
    live_fraction,
)
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads_of
from rlsys.config.schema import AlgorithmConfig

_ENTROPY_KEEP, _STATISTIC = "entropy_keep", "statistic/"


@dataclass(frozen=True)
class PolicyGradient:
    """Policy-gradient loss on sampled tokens, with an optional KL to the reference and an entropy bonus:

        policy loss + kl_coef · KL(π ‖ π_ref) − entropy_coef · entropy

    loss_name, loss_options: name or import path of a policy loss, and its options.
    aggregation: how tokens are weighed.
    horizon: the longest response allowed, which ``seq-mean-token-sum-norm`` divides by.
    kl_coef, kl_estimator, entropy_coef: weights of the other two terms, and how the KL is estimated.
    kl_corrected: the KL estimate is multiplied by π/π_old.
    entropy_quantile: only tokens above this quantile of the batch's entropy under π_old earn the policy loss; the
        others still count in the normaliser.
    functional: the surrogate is restricted to the column ``functional_mask``, normaliser included.
    correction: by name, options of corrections for π_old/μ: token losses are weighed or left out, with their KL and
        entropy terms; the normaliser counts them all (verl takes those that are left out from it, too).
    old_logprobs: where π_old comes from: the ``column`` of that name, or ``self``: π itself without gradient. That is
        the same value and the same gradient as long as the batch is used for exactly one optimiser step, and it saves
        a forward pass.
    mismatch: also report how far π is from the sampler's μ on the sampled tokens; reads ``rollout_logprobs``.
    hybrid: λ: where there is a teacher the advantages are λ·A + (1 − λ)·(log π_teacher − log π_old); None: A. The
        metric ``hybrid/live_fraction`` says for what fraction of rows there is one.
    """

    loss_name: str = "ppo_clip"
    loss_options: dict[str, Any] = field(default_factory=dict)
    aggregation: Aggregation = "token-mean"
    horizon: int | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_corrected: bool = False
    entropy_coef: float = 0.0
    entropy_quantile: float = 0.0
    functional: bool = False
    correction: dict[str, dict[str, Any]] = field(default_factory=dict)
    old_logprobs: Literal["column", "self"] = "column"
    mismatch: bool = False
    hybrid: float | None = None

    sequences = ("response",)

    def __post_init__(self) -> None:
        function = check_loss(self.loss_name, self.loss_options)
        if self.aggregation == "seq-mean-token-sum-norm" and not self.horizon:
            raise ValueError("seq-mean-token-sum-norm needs a horizon: the longest response allowed")
        if self.old_logprobs == "self" and (self.entropy_quantile or prepare_of(function)):
            raise ValueError(f"'{self.loss_name}' with these options looks at π_old before the first micro-batch")

    @classmethod
    def from_config(
        cls,
        config: AlgorithmConfig,
        *,
        horizon: int,
        old_logprobs: Literal["column", "self"],
        mismatch: bool = False,
    ) -> PolicyGradient:
        """The channel that ``algorithm.*`` describes; horizon: ``data.max_response_tokens``."""
        return cls(
            loss_name=config.loss,
            loss_options=config.loss_options,
            aggregation=config.aggregation,
            horizon=horizon,
            kl_coef=config.kl.coef if config.kl.placement == "loss" else 0.0,
            kl_estimator=config.kl.estimator,
            kl_corrected=config.kl.corrected,
            entropy_coef=config.entropy_coef,
            entropy_quantile=config.entropy_quantile,
            functional=config.functional_tokens is not None,
            correction=config.correction,
            old_logprobs=old_logprobs,
            mismatch=mismatch,
            hybrid=config.distillation.hybrid,
        )

    @property
    def _loss_reads(self) -> tuple[str, ...]:
        """Columns that the policy loss itself wants."""
        wanted = reads_of(POLICY_LOSSES.get(self.loss_name, where="algorithm.loss"))
        return tuple(name for name in wanted if name in ("rollout_logprobs", "ref_logprobs"))

    @property
    def reads(self) -> tuple[str, ...]:
        old = ("old_logprobs",) if self.old_logprobs == "column" else ()
        reference = ("ref_logprobs",) if self.kl_coef else ()
        sampler = ("rollout_logprobs",) if self.mismatch or self.correction else ()
        functional = ("functional_mask",) if self.functional else ()
        entropy = ("old_entropy",) if self.entropy_quantile else ()
        teacher = ("teacher_mask",) if self.hybrid is not None else ()
        wanted = (*old, *reference, *sampler, *functional, *entropy, *teacher, *self._loss_reads)
        return tuple(dict.fromkeys(("response_mask", "advantages", *wanted)))

    @property
    def entropy_gradient(self) -> bool:
        return self.entropy_coef != 0

    @property
    def divergence(self) -> DivergencePass | None:
        return DivergencePass("sampled_token") if self.hybrid is not None else None

    def prepare(self, batch: ResponseBatch, collective: Collective) -> Prepared:
        mask, columns = self._mask(batch), {}
        if self.entropy_quantile:
            entropy = batch.columns["old_entropy"]
            columns[_ENTROPY_KEEP] = above_quantile(entropy, mask, self.entropy_quantile, collective)
        function = POLICY_LOSSES.get(self.loss_name, where="algorithm.loss")
        if prepare := prepare_of(function):
            old, advantages = batch.columns["old_logprobs"], batch.columns["advantages"]
            found = prepare(old, advantages, mask, collective, **self.loss_options)
            columns |= {_STATISTIC + name: values for name, values in found.items()}
        local = normaliser(self.aggregation, mask, batch.rows, batch.num_rows)
        return Prepared(None if local is None else collective.sum([local])[0], columns)

    def loss(
        self, batch: ResponseBatch, output: ForwardOutput, columns: Mapping[str, torch.Tensor] | None = None
    ) -> ChannelSums:
        columns = columns or {}
        mask = self._mask(batch)
        old = batch.columns["old_logprobs"] if self.old_logprobs == "column" else output.logprobs.detach()
        function = POLICY_LOSSES.get(self.loss_name, where="algorithm.loss")
        advantages = self._advantages(batch, output, old)
        extras = self._extras(function, batch, columns)
        policy = function(output.logprobs, old, advantages, mask, **extras, **self.loss_options)
        tokens, count = policy.tokens, mask.sum()
        sums = {**policy.sums, "entropy": (output.entropy.detach()[mask].sum(), count)}
        keep = mask
        if self.correction:
            correction = self._correct(batch, old, mask)
            tokens, keep = tokens * correction.weights, mask & correction.keep
            sums |= {f"correction_{name}": pair for name, pair in correction.sums.items()}
            sums["correction_dropped"] = ((mask & ~keep).sum(), count)
        if self.entropy_quantile:
            tokens = torch.where(columns[_ENTROPY_KEEP], tokens, 0.0)
            sums["entropy_kept"] = ((columns[_ENTROPY_KEEP] & mask).sum(), count)
        if self.kl_coef:
            # Both sides are made equal off the mask first: there 0 · inf would be a NaN in the gradient.
            reference = torch.where(mask, batch.columns["ref_logprobs"], 0.0)
            logprobs = torch.where(mask, output.logprobs, 0.0)
            kl = kl_estimate(logprobs, reference, self.kl_estimator)
            if self.kl_corrected:
                kl = corrected(kl, logprobs, torch.where(mask, old, 0.0))
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
        sums["live_fraction"] = live_fraction(mask, batch)
        if self.hybrid is not None:
            sums["hybrid/live_fraction"] = live_fraction(mask & batch.columns["teacher_mask"], batch)
        return ChannelSums((torch.where(keep, tokens, 0.0) * weights).sum(), {"tokens": count}, sums, maxima)

    def _mask(self, batch: ResponseBatch) -> torch.Tensor:
        mask = batch.columns["response_mask"]
        return mask & batch.columns["functional_mask"] if self.functional else mask

    def _advantages(self, batch: ResponseBatch, output: ForwardOutput, old: torch.Tensor) -> torch.Tensor:
        advantages = batch.columns["advantages"]
        if self.hybrid is None:
            return advantages
        if output.teacher is None:
            raise UserError(
                "hybrid advantages need a teacher", where="algorithm.distillation.hybrid", fix="leave it out"
            )
        teacher = output.teacher.logprobs - old
        mixed = self.hybrid * advantages + (1 - self.hybrid) * teacher
        return torch.where(batch.columns["teacher_mask"], mixed, advantages)

    def _extras(
        self, function: Any, batch: ResponseBatch, columns: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor | int | dict[str, torch.Tensor]]:
        """What the policy loss declared that it reads."""
        known: dict[str, Any] = {name: batch.columns[name] for name in self._loss_reads}
        known |= {"rows": batch.rows, "num_rows": batch.num_rows}
        statistics = {k.removeprefix(_STATISTIC): v for k, v in columns.items() if k.startswith(_STATISTIC)}
        known["prepared"] = statistics
        return {name: known[name] for name in reads_of(function)}

    def _correct(self, batch: ResponseBatch, old: torch.Tensor, mask: torch.Tensor) -> Correction:
        sampler = batch.columns["rollout_logprobs"]
        return apply_corrections(self.correction, old, sampler, mask, batch.rows, batch.num_rows)
