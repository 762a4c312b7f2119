"""Preferences: pairs of a chosen and a rejected sequence (DPO, arXiv 2305.18290, and its relatives)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlsys.algorithms.collective import Collective
from rlsys.algorithms.objective import ChannelSums, ForwardOutput, Prepared, ResponseBatch
from rlsys.algorithms.preferences import PREFERENCE_LOSSES, PairLogprobs, pair_sums
from rlsys.config.plugins import check_options
from rlsys.config.schema import PreferenceConfig


@dataclass(frozen=True)
class Preference:
    """A preference loss, as the mean over pairs. A row has a pair where both of its masks have a token.

    loss_name, loss_options: name or import path of the loss, and its options.
    """

    loss_name: str = "dpo"
    loss_options: dict[str, Any] = field(default_factory=dict)

    sequences = ("chosen", "rejected")
    entropy_gradient = False
    divergence = None

    def __post_init__(self) -> None:
        function = PREFERENCE_LOSSES.get(self.loss_name, where="algorithm.preference.loss")
        check_options(function, self.loss_options, where="algorithm.preference.loss_options")

    @classmethod
    def from_config(cls, config: PreferenceConfig) -> Preference:
        """The channel that ``algorithm.preference.*`` describes."""
        return cls(config.loss, dict(config.loss_options))

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.loss_name)

    @property
    def reads(self) -> tuple[str, ...]:
        reference = ("chosen_ref_logprobs", "rejected_ref_logprobs") if self.needs_reference else ()
        return ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask", "pair_slot", *reference)

    def prepare(self, batch: ResponseBatch, collective: Collective) -> Prepared:
        return Prepared(collective.sum([float(self._live(batch).sum())])[0])

    def loss(self, batch: ResponseBatch, output: ForwardOutput, columns: Mapping[str, torch.Tensor]) -> ChannelSums:
        live = self._live(batch)
        chosen, rejected = self._side(batch, output, "chosen", live), self._side(batch, output, "rejected", live)
        function = PREFERENCE_LOSSES.get(self.loss_name, where="algorithm.preference.loss")
        result = function(chosen, rejected, **self.loss_options)
        margin, count = result.margin.detach(), live.sum()
        sums = {
            **result.sums,
            "margin": (margin.sum(), count),
            "accuracy": ((margin > 0).sum(), count),
            "chosen_logprob": (chosen.policy.detach().sum(), chosen.lengths.sum()),
            "rejected_logprob": (rejected.policy.detach().sum(), rejected.lengths.sum()),
            "live_fraction": (count, batch.columns["pair_slot"].sum()),
        }
        totals = {"tokens": chosen.lengths.sum() + rejected.lengths.sum(), "pairs": count}
        return ChannelSums(result.pairs.sum(), totals, sums)

    def _live(self, batch: ResponseBatch) -> torch.Tensor:
        """[B] rows with a pair."""
        both = torch.ones(batch.num_rows, dtype=torch.bool, device=batch.columns["pair_slot"].device)
        for side in self.sequences:
            mask = batch.columns[f"{side}_mask"]
            both &= pair_sums(mask.float(), mask, batch.pair_rows[side], batch.num_rows)[1] > 0
        return both

    def _side(self, batch: ResponseBatch, output: ForwardOutput, side: str, live: torch.Tensor) -> PairLogprobs:
        mask, rows = batch.columns[f"{side}_mask"], batch.pair_rows[side]
        policy, lengths = pair_sums(output.pair_logprobs[side], mask, rows, batch.num_rows)
        reference = None
        if self.needs_reference:
            reference = pair_sums(batch.columns[f"{side}_ref_logprobs"], mask, rows, batch.num_rows)[0][live]
        return PairLogprobs(policy[live], reference, lengths[live])


def needs_reference(loss: str) -> bool:
    """Whether the preference loss of this name reads the reference's log-probs."""
    return getattr(PREFERENCE_LOSSES.get(loss, where="algorithm.preference.loss"), "needs_reference", True)
