"""The rollout-engine contract: tokens in, tokens and the sampler's own log-probs out, versioned weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from rlsys.batch.versions import WeightVersion
from rlsys.config.errors import UserError
from rlsys.engines.sync.buckets import Bucket, Parcel
from rlsys.environments.base import Sample, SamplingParams

__all__ = [
    "Bucket",
    "InFlight",
    "Parcel",
    "Rest",
    "RolloutEngine",
    "Sample",
    "SamplingParams",
    "WeightVersion",
    "check_prompt",
]

InFlight = Literal["finish", "keep", "recompute"]


@dataclass(frozen=True)
class Rest:
    """What a sleep or a waking did. before, after: bytes in use, of the sampler's processes on a CPU, of its GPUs by
    everybody on a GPU. due: bytes by which the one must at least differ from the other."""

    before: int = 0
    after: int = 0
    due: int = 0


class RolloutEngine(Protocol):
    """One sampler with one copy of the weights. All calls are coroutines of one event loop; many ``generate`` calls run
    at once and the engine batches them.

    version: of the weights it holds. A fresh engine is at ``WeightVersion(0, 0)``.
    """

    version: WeightVersion

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        """Continue one sequence.

        Returns:
            Sample: tokens (the end token included), log μ of each token at ``temperature`` (at temperature 0: of the
            untempered distribution), the weights' version of each token, and ``stop`` or ``length``. A sequence that
            reaches the engine's ``max_length`` ends with ``length``.

        A call that is cancelled gives up its sequence: it takes no more computing, and no memory.

        Raises:
            UserError: the prompt is empty or leaves no room for a token.
        """
        ...

    def sampled_tokens(self) -> int:
        """Tokens sampled since the engine was started, those of sequences under way and of given-up ones too. May be
        asked from any thread."""
        ...

    async def gpus(self) -> list[str]:
        """UUIDs of the GPUs that its weights lie on; none on a CPU."""
        ...

    async def checksum(self) -> str:
        """Checksum (``rlsys.engines.sync.checksum``) of the weights that the engine holds now."""
        ...

    async def update_weights(
        self, buckets: Iterable[Parcel], version: WeightVersion, in_flight: InFlight = "finish"
    ) -> str:
        """Take new weights; nothing is sampled with half of them, and no cache of the old ones is served to a sequence
        that begins afterwards. New sequences wait for the new weights.

        Args:
            in_flight: what becomes of sequences under way. ``finish``: they end with the old weights first. ``keep``:
                they pause between two tokens and go on with the new weights, on keys and values of the old ones for
                what they have so far. ``recompute``: the same, on keys and values computed anew. Either way a partial
                response goes on as it is, so there is nothing to be put back and asked for again, and each of its
                tokens has the version and the log-prob of the weights that sampled it. An engine that cannot pause
                says so once in the log, and finishes.

        Returns:
            The checksum of the weights that the engine now holds, computed from what it holds and not from what it
            was sent.

        Raises:
            SyncError: the update broke off half-way; the engine samples nothing more.
        """
        ...

    async def sleep(self, *, weights: bool = True) -> Rest:
        """Gives back the memory of the KV cache; what is under way is given up. Nothing is sampled until :meth:`wake`.

        Args:
            weights: also that of the weights, which must then be sent anew: ``update_weights`` makes room for them.
                Weights that are never sent (an adapter's base) are kept where they cost the device nothing.
        """
        ...

    async def wake(self) -> Rest:
        """Takes the memory of the KV cache again; without a sleep before it nothing happens.

        Raises:
            SyncError: the weights were given back, and no new ones have come.
        """
        ...

    async def close(self) -> None:
        """Frees memory and ends every process that the engine started."""
        ...


def check_prompt(token_ids: list[int], max_length: int) -> None:
    """Refuses a prompt that an engine of ``max_length`` positions cannot continue."""
    if not token_ids:
        raise UserError("a prompt has no tokens", fix="give every prompt at least one token")
    if len(token_ids) >= max_length:
        raise UserError(
            f"a prompt of {len(token_ids)} tokens leaves no room for a response within {max_length}",
            where="data.max_prompt_tokens",
            fix="raise data.max_response_tokens, or lower data.max_prompt_tokens",
        )
