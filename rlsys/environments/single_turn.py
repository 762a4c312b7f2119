"""Single-turn: one prompt, one response."""

from __future__ import annotations

from typing import Any

from rlsys.environments.base import ENVIRONMENTS, SamplingClient, Span, Trajectory


@ENVIRONMENTS.register("single_turn")
class SingleTurn:
    """The trivial environment: the whole response is one sampled span."""

    async def run(self, prompt_ids: list[int], task: dict[str, Any], client: SamplingClient) -> Trajectory:
        sample = await client.sample(prompt_ids)
        span = Span(sample.token_ids, True, sample.logprobs, sample.versions)
        return Trajectory([span], sample.finish_reason)
