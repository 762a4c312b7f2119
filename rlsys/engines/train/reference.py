"""The frozen reference policy: the trainer's own forward pass, without a gradient, an optimiser or other ranks."""

from __future__ import annotations

import torch

from rlsys.batch import DataProto, jagged
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train.attention import packs
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.model import PolicyModel, context_length, load_causal_lm
from rlsys.engines.train.rows import RankRows


class ReferenceEngine:
    """One process with the whole model in ``model.dtype``."""

    def __init__(self, policy: PolicyModel, trainer: TrainerConfig, *, max_length: int) -> None:
        self._device = training_device()
        self._policy = policy.requires_grad_(False).to(self._device)
        self._trainer, self._max_length = trainer, max_length

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        trainer: TrainerConfig,
        *,
        temperature: float,
        threads: int | None = None,
        longest: int | None = None,
    ) -> ReferenceEngine:
        """Reads the model.

        Args:
            model: of the policy at the start of training.
            trainer: its token budget and packing count here too.
            temperature: of the sampler; logits are divided by it.
            threads: CPU threads of this process; None: as they are.
            longest: as ``load_engine`` takes it.

        Raises:
            UserError: the model cannot be used (see ``rlsys.engines.train.model``).
        """
        if threads is not None:
            torch.set_num_threads(threads)
        lm = load_causal_lm(model, getattr(torch, model.dtype), packing=trainer.rows != "padded", longest=longest)
        policy = PolicyModel(lm, temperature=temperature)
        return cls(policy, trainer, max_length=context_length(lm))

    @torch.no_grad()
    def forward(self, batch: DataProto) -> DataProto:
        """The jagged column ``ref_logprobs`` [B, j:response] of the rows given, on the CPU; 0 off ``response_mask``.

        Args:
            batch: rows with ``prompt_ids``, ``response_ids`` and ``response_mask``.
        """
        rows = RankRows(
            batch,
            (),
            max_length=self._max_length,
            token_budget=self._trainer.micro_batch_tokens * self._trainer.sequence_ranks,
            packing=packs(self._policy.lm),
            share_prompts=self._trainer.rows == "shared",
        )
        logprobs = torch.zeros(rows.num_tokens, device=self._device)
        for micro in rows.cut(len(rows.plan), self._device):
            output = self._policy(micro.input_ids, micro.positions, micro.targets, packing=micro.packing)
            logprobs[micro.token_index] = micro.spread(output.logprobs)
        column = jagged.from_values(logprobs.cpu(), rows.response_lengths)
        return DataProto.from_dict(tensors={"ref_logprobs": column})
