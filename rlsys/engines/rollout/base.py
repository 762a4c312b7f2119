"""The rollout-engine contract: tokens in, tokens and the sampler's own log-probs out, versioned weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from rlsys.batch.versions import WeightVersion
from rlsys.engines.sync.buckets import Bucket
from rlsys.environments.base import Sample


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. Always from the full vocabulary: no top-p, top-k, min-p or penalty exists here.

    temperature: logits are divided by it; 0: greedy (evaluation).
    max_tokens: longest continuation.
    seed: of this sequence alone; the same seed, prompt and weights give the same tokens whatever else is in the batch
        (exactly for the torch engine on the same batch; up to kernel round-off otherwise).
    stop: texts that end the sequence; stop_token_ids: ids that do, besides the model's end-of-sequence ids.
    """

    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = field(default=())


class RolloutEngine(Protocol):
    """One sampler with one copy of the weights. All calls are coroutines of one event loop; many ``generate`` calls run
    at once and the engine batches them."""

    version: WeightVersion

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        """Continue one sequence.

        Returns:
            Sample: tokens (the end token included), log μ of each token at ``temperature`` (at temperature 0: of the
            untempered distribution), the weights' version of each token, and ``stop`` or ``length``.
        """
        ...

    async def update_weights(self, buckets: Iterable[Bucket], version: WeightVersion) -> str:
        """Take new weights; nothing is sampled with half of them, and no cache of the old ones is served afterwards.

        Returns:
            The checksum of the weights that the engine now holds (``rlsys.engines.sync.checksum``), computed from
            what it holds and not from what it was sent.
        """
        ...

    async def close(self) -> None:
        """Frees memory and ends every process that the engine started."""
        ...
