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


class SamplingClient(Protocol):
    """Continues token sequences. Bound to one sample of one prompt: it knows temperature, limits, stop rules and the sample's
    seed (a function of run seed, prompt uid, sample index, attempt)."""

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
