"""The trajectory contract: an environment runs against a sampling client and returns spans. Tokens in, tokens out:
text is for people and never re-tokenised into a training sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from rlsys.batch.versions import WeightVersion
from rlsys.config.plugins import Registry


@dataclass(frozen=True)
class Sample:
    """What a sampling client returns for one continuation.

    token_ids: sampled tokens, the end-of-sequence or stop token included.
    logprobs: log μ of each, at the sampling temperature, in nats.
    versions: the weights that sampled each token.
    finish_reason: ``stop`` or ``length``.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[WeightVersion]
    finish_reason: str


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. Always from the full vocabulary: no top-p, top-k, min-p or penalty exists here.

    temperature: logits are divided by it; 0: greedy (evaluation).
    max_tokens: longest continuation.
    seed: of this sequence alone, 0 … 2⁶³-1; the same seed, prompt and weights give the same tokens whatever else is in
        the batch (exactly for the torch engine on the same batch; up to kernel round-off otherwise). Its low 32 bits
        must differ between samples: vLLM on a CPU uses no others.
    stop: texts that end the sequence; stop_token_ids: ids that do, besides the model's end-of-sequence ids.
    """

    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class Sampler(Protocol):
    """The part of a rollout engine that environments need."""

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample: ...


class SamplingClient(Protocol):
    """Continues token sequences. Bound to one sample of one prompt: it knows temperature, limits, stop rules and the
    sample's seed (a function of run seed, prompt uid, sample index, attempt)."""

    async def sample(self, token_ids: list[int], *, max_tokens: int | None = None) -> Sample:
        """Continue ``token_ids``; ``max_tokens`` tightens the response limit for this call."""
        ...


@dataclass(frozen=True)
class Span:
    """Consecutive tokens after the prompt: sampled by the policy (then with logprobs and versions), or given to it."""

    token_ids: list[int]
    sampled: bool
    logprobs: list[float] = field(default_factory=list)
    versions: list[WeightVersion] = field(default_factory=list)


@dataclass(frozen=True)
class Trajectory:
    """spans: in order; finish_reason: of the last sampled span; feedback: the environment's words about the outcome;
    info: scalars worth logging."""

    spans: list[Span]
    finish_reason: str
    feedback: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """Plays one sample of one task."""

    async def run(self, prompt_ids: list[int], task: dict[str, Any], client: SamplingClient) -> Trajectory: ...


ENVIRONMENTS: Registry[type[Environment]] = Registry("environment", "rlsys.environments")
