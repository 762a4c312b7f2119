"""transformers' own ``generate`` behind the interface of a continuous batch, for models that the decoder does not know:
a batch is decoded until its last row ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlsys.engines.rollout.batching import Continuation, Finished, has_stop_text
from rlsys.engines.rollout.noise import sample_tokens
from rlsys.environments.base import SamplingParams


class WholeBatches:
    """See :class:`rlsys.engines.rollout.batching.ContinuousBatch`. What is under way goes on to its end, whoever has
    given it up."""

    pauses = False

    def __init__(
        self, model: PreTrainedModel, max_rows: int, end_ids: tuple[int, ...], decode: Callable[[list[int]], str]
    ):
        self._model, self._max_rows, self._end_ids, self._decode = model, max_rows, end_ids, decode
        self._batch: list[Continuation] = []
        self.sampled = 0

    def interrupt(self) -> None:
        """Nothing."""

    def go_on(self) -> None:
        """Nothing."""

    def lengths(self) -> list[tuple[Continuation, int]]:
        return [(sequence, 0) for sequence in self._batch]

    def recompute(self) -> None:
        """Nothing is kept of what was computed."""

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def room(self) -> int:
        return 0 if self._batch else self._max_rows

    def clear(self) -> None:
        self._batch = []

    def refresh(self) -> None:
        """Nothing is kept of the weights."""

    def release(self) -> int:
        """Gives up everything under way; a cache lives no longer than its batch, so that there are no bytes of it."""
        self.clear()
        return 0

    def drop(self, is_unwanted: Callable[[Continuation], bool]) -> None:
        self._batch = [sequence for sequence in self._batch if not is_unwanted(sequence)]

    def add(self, sequences: Sequence[Continuation], *, waiting: int = 0) -> list[Finished]:
        self._batch = list(sequences)
        return []

    @torch.inference_mode()
    def run(self) -> list[Finished]:
        batch, self._batch = self._batch, []
        if not batch:
            return []
        device = self._model.device
        longest = max(len(s.prompt) for s in batch)
        pad = 0  # any word: it is masked before a prompt, and dropped after a response
        input_ids = torch.full((len(batch), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(batch):
            input_ids[row, longest - len(sequence.prompt) :] = torch.tensor(sequence.prompt)
            mask[row, longest - len(sequence.prompt) :] = 1
        picker = _Picker([s.params for s in batch], device)
        stopper = _Stopper(batch, longest, self._end_ids, self._decode, self._count)
        self._model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max(s.limit for s in batch), pad_token_id=pad
            ),
            logits_processor=LogitsProcessorList([picker]),
            stopping_criteria=StoppingCriteriaList([stopper]),
        )
        tokens, logprobs = picker.picked()
        return [
            Finished(sequence, tokens[row][:n], logprobs[row][:n], stopped)
            for row, (sequence, n, stopped) in enumerate(zip(batch, stopper.lengths, stopper.stopped, strict=True))
        ]

    def _count(self, tokens: int) -> None:
        self.sampled += tokens


class _Picker(LogitsProcessor):
    """Picks each row's token, keeps its log-prob, and leaves scores whose argmax it is."""

    def __init__(self, rows: list[SamplingParams], device: torch.device):
        self._temperatures = torch.tensor([p.temperature or 1.0 for p in rows], device=device)
        self._greedy = torch.tensor([p.temperature == 0 for p in rows], device=device)
        self._seeds = torch.tensor([p.seed for p in rows], dtype=torch.int64, device=device)
        self._tokens: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] raw logits → [B, V], 1 at the sampled token and 0 elsewhere."""
        position = torch.full_like(self._seeds, len(self._tokens))
        tokens, logprobs = sample_tokens(scores.float(), self._temperatures, self._seeds, position, greedy=self._greedy)
        self._tokens.append(tokens)
        self._logprobs.append(logprobs)
        return torch.zeros_like(scores).scatter_(1, tokens[:, None], 1.0)

    def picked(self) -> tuple[list[list[int]], list[list[float]]]:
        """[B][T] tokens and log-probs, what came after a row's end included."""
        return torch.stack(self._tokens, 1).tolist(), torch.stack(self._logprobs, 1).tolist()


class _Stopper(StoppingCriteria):
    """Ends each row by its own rules: end token, stop text, limit.

    lengths: [B] tokens of each response so far; stopped: [B] whether it ended by a stop rule.
    """

    def __init__(
        self,
        rows: list[Continuation],
        prompt_tokens: int,
        end_ids: tuple[int, ...],
        decode: Callable[[list[int]], str],
        count: Callable[[int], None],
    ):
        self._rows, self._start, self._decode, self._count = rows, prompt_tokens, decode, count
        self._ends = [{*end_ids, *s.params.stop_token_ids} for s in rows]
        self._open = list(range(len(rows)))
        self.lengths = [0] * len(rows)
        self.stopped = [False] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """input_ids [B, prompt + response] → [B] bool, true where the row is done."""
        responses = input_ids[:, self._start :].tolist()
        self._count(len(self._open))
        still_open = []
        for row in self._open:
            sequence, response = self._rows[row], responses[row]
            self.lengths[row] = len(response)
            if response[-1] in self._ends[row] or has_stop_text(response, sequence.params.stop, self._decode):
                self.stopped[row] = True
            elif self.lengths[row] < sequence.limit:
                still_open.append(row)
        self._open = still_open
        done = torch.ones(len(responses), dtype=torch.bool)
        done[still_open] = False
        return done.to(input_ids.device)
