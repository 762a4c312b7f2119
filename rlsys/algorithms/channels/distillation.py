"""Self-distillation: the policy moves towards a teacher that sees more (arXiv 2601.20802)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlsys.algorithms.aggregation import normaliser, token_weights
from rlsys.algorithms.collective import Collective
from rlsys.algorithms.mismatch import mismatch_sums
from rlsys.algorithms.objective import (
    ChannelSums,
    DivergencePass,
    ForwardOutput,
    Prepared,
    ResponseBatch,
    live_fraction,
)
from rlsys.config.schema import DistillationConfig

# exp(±20) is far outside any cap and far inside float32's range.
_LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Distillation:
    """divergence(student, teacher) on the tokens of ``teacher_mask``, times min(π/π_old, ratio_cap).

    spec: what the forward pass computes.
    ratio_cap: None: token losses are not weighed. The ratio carries no gradient.
    old_logprobs: as of PolicyGradient; ``self``: the ratio is 1.
    entropy: also report the policy's entropy on the sampled tokens, where no policy-gradient channel does.
    mismatch: also report how far π is from the sampler's μ on the sampled tokens; reads ``rollout_logprobs``.
    """

    spec: DivergencePass
    ratio_cap: float | None = 2.0
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    old_logprobs: Literal["column", "self"] = "column"
    entropy: bool = False
    mismatch: bool = False

    sequences = ("response",)
    entropy_gradient = False

    @classmethod
    def from_config(
        cls,
        config: DistillationConfig,
        *,
        old_logprobs: Literal["column", "self"],
        entropy: bool = False,
        mismatch: bool = False,
    ) -> Distillation:
        """The channel that ``algorithm.distillation.*`` describes."""
        spec = DivergencePass(config.divergence, dict(config.divergence_options), top_k=config.top_k, tail=config.tail)
        return cls(spec, config.ratio_cap, config.aggregation, old_logprobs, entropy, mismatch)

    @property
    def divergence(self) -> DivergencePass:
        return self.spec

    @property
    def reads(self) -> tuple[str, ...]:
        old = ("old_logprobs",) if self.ratio_cap is not None and self.old_logprobs == "column" else ()
        sampler = ("rollout_logprobs",) if self.mismatch else ()
        return ("response_mask", "teacher_mask", *old, *sampler)

    def prepare(self, batch: ResponseBatch, collective: Collective) -> Prepared:
        local = normaliser(self.aggregation, batch.columns["teacher_mask"], batch.rows, batch.num_rows)
        return Prepared(None if local is None else collective.sum([local])[0])

    def loss(self, batch: ResponseBatch, output: ForwardOutput, columns: Mapping[str, torch.Tensor]) -> ChannelSums:
        if output.teacher is None:
            raise ValueError("self-distillation needs a teacher's pass")
        mask, count = batch.columns["teacher_mask"], batch.columns["teacher_mask"].sum()
        tokens = output.teacher.divergence
        sums: dict[str, Any] = {}
        if self.ratio_cap is not None and self.old_logprobs == "column":
            log_ratio = torch.where(mask, output.logprobs.detach() - batch.columns["old_logprobs"], 0.0)
            ratio = log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
            tokens = tokens * ratio.clamp(max=self.ratio_cap)
            sums["ratio_capped"] = ((ratio > self.ratio_cap).sum(), count)
        weights = token_weights(self.aggregation, mask, batch.rows, batch.num_rows)
        gap = torch.where(mask, output.teacher.logprobs - output.logprobs.detach(), 0.0)
        sums |= {
            "divergence": (torch.where(mask, output.teacher.divergence.detach(), 0.0).sum(), count),
            "teacher_entropy": (torch.where(mask, output.teacher.entropy, 0.0).sum(), count),
            "teacher_advantage": (gap.sum(), count),
            "live_fraction": live_fraction(mask, batch),
        }
        maxima: dict[str, torch.Tensor] = {}
        sampled = batch.columns["response_mask"]
        if self.entropy:
            sums["entropy"] = (output.entropy.detach()[sampled].sum(), sampled.sum())
        if self.mismatch:
            off = mismatch_sums(output.logprobs.detach(), batch.columns["rollout_logprobs"], sampled)
            sums |= {
                "mismatch_abs_mean": (off.absolute, off.tokens),
                "mismatch_kl": (off.k3, off.tokens),
            }
            maxima["mismatch_abs_max"] = off.largest
        return ChannelSums((torch.where(mask, tokens, 0.0) * weights).sum(), {"tokens": count}, sums, maxima)
