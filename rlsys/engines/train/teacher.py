"""The teacher of self-distillation, in the trainer's own ranks: the policy itself, or a second model beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlsys.algorithms.divergences.chunked import Head
from rlsys.algorithms.objective import DivergencePass
from rlsys.checkpoint.shards import Shard
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig
from rlsys.engines.train.attention import packs
from rlsys.engines.train.base import ShardedModel
from rlsys.engines.train.lora import adapter_off
from rlsys.engines.train.model import PolicyModel, TeacherInputs, ValueModel, load_causal_lm
from rlsys.engines.train.rows import TeacherRows


class Teacher:
    """Hidden states of a teacher's sequences, without gradient.

    policy: of this rank. other: the model beside it, sharded in the same way; None: the policy teaches itself.
    base: the other is the policy without its adapter.
    mix: share of the policy's logits; the rest are the other's.
    rate: the other's weights follow the policy's by so much an optimiser step.
    """

    def __init__(self, policy: PolicyModel, other: ShardedModel | None, *, mix: float, rate: float, base: bool = False):
        self._policy, self._other, self._base = policy, other, base
        self._mix, self._rate = mix, rate

    @classmethod
    def load(
        cls,
        config: DistillationConfig,
        model: ModelConfig,
        policy: PolicyModel,
        shard: Callable[[PolicyModel, bool], ShardedModel],
        *,
        temperature: float,
        longest: int | None = None,
    ) -> Teacher:
        """The teacher that ``config`` describes. shard: spreads a model over the ranks; told
        whether its weights will move. longest: as
        ``load_engine`` takes it.

        Raises:
            UserError: the teacher cannot be loaded, or has another vocabulary.
        """
        if config.teacher == "self":
            return cls(policy, None, mix=1.0, rate=0.0)
        mix = config.teacher_mix if config.teacher == "trust_region" else 0.0
        if model.lora is not None and config.teacher in ("frozen", "trust_region"):
            return cls(policy, None, mix=mix, rate=0.0, base=True)
        where = model if config.teacher != "model" else ModelConfig(
            path=config.teacher_path or "", dtype=model.dtype, attention=model.attention
        )  # fmt: skip
        lm = load_causal_lm(where, torch.float32, packing=packs(policy.lm), longest=longest, mapped=True)
        sizes = [m.get_output_embeddings().out_features for m in (policy.lm, lm)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the policy has a vocabulary of {sizes[0]} words and the teacher one of {sizes[1]}",
                where="algorithm.distillation.teacher_path",
                fix="use a teacher with the policy's tokenizer and embedding size",
            )
        rate = config.teacher_rate if config.teacher == "ema" else 0.0
        other = shard(PolicyModel(lm, temperature=temperature).requires_grad_(False), rate > 0)
        return cls(policy, other, mix=mix, rate=rate)

    @property
    def packs(self) -> bool:
        """Whether all the models that look take packed rows."""
        models = [self._policy] * bool(self._mix or self._base) + (
            [self._other.model] if self._other is not None else []
        )
        return all(packs(model.lm) for model in models)

    @property
    def beside(self) -> ShardedModel | None:
        """The second model; None: there is none."""
        return self._other

    @property
    def saved(self) -> dict[str, Shard]:
        """Weights that a checkpoint must hold: those that moved since the start."""
        return self._other.weights() if self._other is not None and self._rate else {}

    def restored(self) -> None:
        """After ``saved`` was written to."""
        if self._other is not None:
            self._other.moved()

    @torch.no_grad()
    def look(self, rows: TeacherRows, spec: DivergencePass) -> TeacherInputs:
        """What the student's pass needs. A collective: every rank looks, also at nothing."""
        parts: list[tuple[float, torch.Tensor, Head | None]] = []
        if self._mix:
            hidden, _ = _states(self._policy, rows)
            parts.append((self._mix, hidden, None))
        if self._base:
            with adapter_off(self._policy):
                hidden, _ = _states(self._policy, rows)
            parts.append((1.0 - self._mix, hidden, None))
        if self._other is not None:
            hidden, head = _states(self._other.model, rows)
            parts.append((1.0 - self._mix, hidden, head))
        return TeacherInputs(rows.student, tuple(parts), spec)

    @torch.no_grad()
    def follow(self, policy: dict[str, Shard]) -> None:
        """After an optimiser step: an average moves towards the policy's weights, cut in the same way."""
        if self._other is None or not self._rate:
            return
        for name, mine in self._other.weights().items():
            mine.local.lerp_(policy[name].local.to(mine.local.device), self._rate)
        self._other.moved()

    def release(self) -> None:
        """Lets go of gathered weights, which would go stale with the next step."""
        if self._other is not None:
            self._other.release()


def _states(model: PolicyModel | ValueModel, rows: TeacherRows) -> tuple[torch.Tensor, Head]:
    """[n, H] hidden states of the tokens that the divergence is about here, and the head."""
    hidden, head = model(rows.input_ids, rows.positions, None, packing=rows.packing)
    return hidden if rows.exchange is None else rows.exchange(hidden), head
