"""Continuous batching: rows that end leave at once, waiting ones take their place, and a step decodes exactly those
that are under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from rlsys.engines.rollout.decoder import Decoder
from rlsys.engines.rollout.kv_cache import KVCache
from rlsys.engines.rollout.noise import sample_tokens
from rlsys.environments.base import SamplingParams

_PREFILL_TOKENS = 8192  # of one pass over prompts, padding included


@dataclass(frozen=True)
class Continuation:
    """What is to be continued. limit: most tokens of the response; key: the caller's own, handed back."""

    prompt: list[int]
    params: SamplingParams
    limit: int
    key: object


@dataclass(frozen=True)
class Finished:
    """A response: tokens, the log-prob of each, and whether it ended by a stop rule (else by its limit)."""

    sequence: Continuation
    token_ids: list[int]
    logprobs: list[float]
    stopped: bool


# Row of the batch's table of integers.
_TOKEN, _POSITION, _COUNT, _LIMIT, _SEED, _STOPS, _SLOT = range(7)


class ContinuousBatch:
    """Rows under way. What a call computes depends on the sequences that were added and on nothing else.

    sampled: tokens, since it was made.

    Args:
        decoder: of the model.
        vocabulary: V of its head.
        max_rows: sequences at once.
        end_ids: tokens that end every response.
        decode: tokens to text, for stop texts.
    """

    pauses = True  # between two tokens, for new weights

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: int,
        max_rows: int,
        end_ids: tuple[int, ...],
        decode: Callable[[list[int]], str],
    ):
        self._decoder, self._vocabulary, self._max_rows = decoder, vocabulary, max_rows
        self._end_ids, self._decode = end_ids, decode
        self._cache = KVCache(decoder)
        self.sampled = 0
        self._interrupted = False
        self.clear()

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def room(self) -> int:
        """Sequences that may be added now. Fewer than an eighth of all rows are not worth a pass over their prompts."""
        free = self._max_rows - len(self)
        return free if free >= self._max_rows / 8 else 0

    def clear(self) -> None:
        """Gives up everything under way. What comes next is computed as by a new batch, to the last bit."""
        device = self._decoder.device
        self._sequences: list[Continuation] = []
        self._cache.keep([])
        self._state = torch.empty((7, 0), dtype=torch.int64, device=device)
        self._temperatures = torch.empty(0, device=device)
        self._free_slots = list(range(self._max_rows - 1, -1, -1))
        self._tokens, self._logprobs = self._responses(0)
        self._stop_sets: dict[tuple[int, ...], int] = {}
        self._stop_table = torch.empty((0, self._vocabulary), dtype=torch.bool, device=device)
        self._longest = 0
        self._any_greedy = self._any_text = False

    @torch.inference_mode()
    def add(self, sequences: Sequence[Continuation], *, waiting: int = 0) -> list[Finished]:
        """Takes in sequences (equal prompts side by side), and samples the first token of each.

        Args:
            waiting: how many more will follow: the cache is made for them too.

        Returns:
            Those that end with their first token.
        """
        if not sequences:
            return []
        if not self._sequences:
            self.clear()
        most = min(self._max_rows, len(self) + len(sequences) + waiting)
        longest = max(s.limit for s in sequences)
        if longest > self._longest:
            before, self._longest = self._longest, longest
            old = self._tokens, self._logprobs
            self._tokens, self._logprobs = self._responses(longest)
            if self._sequences:
                self._tokens[:, :before], self._logprobs[:, :before] = old
        finished: list[Finished] = []
        same_prompt = [list(same) for _, same in groupby(sequences, key=lambda s: s.prompt)]
        for part in _passes([same[0].prompt for same in same_prompt]):
            finished += self._add(same_prompt[part], most)
        return finished

    def _add(self, prompts: list[list[Continuation]], most: int) -> list[Finished]:
        """prompts: sequences by equal prompt; one pass over these."""
        device = self._decoder.device
        logits, kv = self._prefill([same[0].prompt for same in prompts])
        added = [s for same in prompts for s in same]
        source = torch.tensor([i for i, same in enumerate(prompts) for _ in same], device=device)
        before = len(self)
        self._cache.add(kv, source, [len(s.prompt) for s in added], most=most, response=self._longest)
        state = [
            # The token comes from the logits; its position is that of the first response token.
            [0, len(s.prompt), 0, s.limit, s.params.seed, self._stop_set(s.params), self._free_slots.pop()]
            for s in added
        ]
        self._sequences += added
        self._state = torch.cat([self._state, torch.tensor(state, device=device).T], 1)
        temperatures = torch.tensor([s.params.temperature for s in added], device=device)
        self._temperatures = torch.cat([self._temperatures, temperatures])
        self._any_greedy = self._any_greedy or any(s.params.temperature == 0 for s in added)
        self._any_text = self._any_text or any(s.params.stop for s in added)
        return self._sampled(logits[source], before)

    def _prefill(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after the last token of each row, and keys and values of all."""
        device = self._decoder.device
        lengths = [len(tokens) for tokens in rows]
        longest = max(lengths)
        padded = [[0] * (longest - len(tokens)) + tokens for tokens in rows]
        pads = torch.tensor([longest - n for n in lengths], device=device)
        return self._decoder.prefill(torch.tensor(padded, device=device), pads, padded=min(lengths) < longest)

    def interrupt(self) -> None:
        """Has a ``run`` that another thread is in return after the token that it is at, and the next one at once."""
        self._interrupted = True

    def go_on(self) -> None:
        """No ``run`` is to be interrupted any more."""
        self._interrupted = False

    @torch.inference_mode()
    def run(self) -> list[Finished]:
        """Decodes until at least one row ends, or it is interrupted. Returns the rows that ended."""
        finished: list[Finished] = []
        while not finished and self._sequences and not self._interrupted:
            cache, mask = self._cache.advance(self._longest)
            logits = self._decoder.step(self._state[_TOKEN], self._state[_POSITION], cache, mask)
            self._state[_POSITION] += 1
            finished = self._sampled(logits, 0)
        return finished

    def refresh(self) -> None:
        """To be called when the model has new weights. Rows under way keep the keys and values that they have."""
        self._decoder.refresh()

    def lengths(self) -> list[tuple[Continuation, int]]:
        """What is under way, and how many tokens each response has so far."""
        return list(zip(self._sequences, self._state[_COUNT].tolist(), strict=True))

    @torch.inference_mode()
    def recompute(self) -> None:
        """Computes keys and values of all rows anew, under the weights that the model has now."""
        if not self._sequences:
            return
        slots, counts = self._state[_SLOT].tolist(), self._state[_COUNT].tolist()
        # Those of the last token come with the next step, as they would have.
        known = [
            s.prompt + self._tokens[slot, : count - 1].tolist()
            for s, slot, count in zip(self._sequences, slots, counts, strict=True)
        ]
        order = sorted(range(len(known)), key=lambda row: -len(known[row]))  # the longest one gives the cache its clock
        self._sequences = [self._sequences[row] for row in order]
        index = torch.tensor(order, dtype=torch.int64, device=self._decoder.device)
        self._state, self._temperatures = self._state[:, index], self._temperatures[index]
        left = max(s.limit - counts[row] for s, row in zip(self._sequences, order, strict=True))
        self._cache.keep([])
        known = [known[row] for row in order]
        for part in _passes(known):
            _, kv = self._prefill(known[part])
            lengths = [len(tokens) for tokens in known[part]]
            source = torch.arange(len(lengths), device=self._decoder.device)
            self._cache.add(kv, source, lengths, most=len(order), response=left)

    def release(self) -> int:
        """Gives up everything under way, and the memory of the cache: so many bytes."""
        self.clear()
        return self._cache.release()

    @torch.inference_mode()
    def drop(self, is_unwanted: Callable[[Continuation], bool]) -> None:
        """Gives up rows that nobody waits for any more."""
        gone = [row for row, sequence in enumerate(self._sequences) if is_unwanted(sequence)]
        if gone:
            self._leave(gone)

    def _sampled(self, logits: torch.Tensor, first: int) -> list[Finished]:
        """Samples a token for the rows from ``first`` on. Those that end with it leave."""
        state = self._state[:, first:]
        temperatures, greedy = self._temperatures[first:], None
        if self._any_greedy:
            greedy = temperatures == 0
            temperatures = temperatures.masked_fill(greedy, 1.0)
        tokens, logprobs = sample_tokens(logits, temperatures, state[_SEED], state[_COUNT], greedy=greedy)
        # Each in its row's slot, which stays while rows move.
        self._tokens[state[_SLOT], state[_COUNT]] = tokens
        self._logprobs[state[_SLOT], state[_COUNT]] = logprobs
        state[_TOKEN] = tokens
        state[_COUNT] += 1
        self.sampled += len(tokens)
        stopped = self._stop_table[state[_STOPS], tokens]
        ended = stopped | (state[_COUNT] >= state[_LIMIT])
        rows = (ended.nonzero()[:, 0] + first).tolist()
        by_text = self._with_stop_text(first) if self._any_text else set()
        gone = sorted({*rows, *by_text})
        if not gone:
            return []
        by_token = stopped.tolist()
        finished = [self._finished(row, by_token[row - first] or row in by_text) for row in gone]
        self._leave(gone)
        return finished

    def _with_stop_text(self, first: int) -> set[int]:
        """Rows, of those from ``first`` on, whose last token completed a stop text."""
        found = set()
        for row in range(first, len(self)):
            texts = self._sequences[row].params.stop
            if texts:
                slot, count = int(self._state[_SLOT, row]), int(self._state[_COUNT, row])
                tail = self._tokens[slot, max(0, count - _tail(texts)) : count].tolist()
                if has_stop_text(tail, texts, self._decode):
                    found.add(row)
        return found

    def _finished(self, row: int, stopped: bool) -> Finished:
        slot, count = int(self._state[_SLOT, row]), int(self._state[_COUNT, row])
        tokens, logprobs = self._tokens[slot, :count].tolist(), self._logprobs[slot, :count].tolist()
        return Finished(self._sequences[row], tokens, logprobs, stopped)

    def _leave(self, gone: list[int]) -> None:
        """Takes rows out; the last ones fill the gaps."""
        self._free_slots += self._state[_SLOT, gone].tolist()
        left = len(self) - len(gone)
        holes = [row for row in gone if row < left]
        tail = sorted(set(range(left, len(self))).difference(gone))
        order = list(range(left))
        for hole, row in zip(holes, tail, strict=True):
            order[hole] = row
        self._cache.keep(order)
        self._sequences = [self._sequences[row] for row in order]
        index = torch.tensor(order, dtype=torch.int64, device=self._decoder.device)
        self._state, self._temperatures = self._state[:, index], self._temperatures[index]

    def _stop_set(self, params: SamplingParams) -> int:
        """Row of the table of stop tokens."""
        ids = tuple(sorted({*self._end_ids, *params.stop_token_ids}))
        if ids not in self._stop_sets:
            self._stop_sets[ids] = len(self._stop_sets)
            ends = torch.zeros((1, self._vocabulary), dtype=torch.bool)
            ends[0, [i for i in ids if i < self._vocabulary]] = True
            self._stop_table = torch.cat([self._stop_table, ends.to(self._stop_table.device)])
        return self._stop_sets[ids]

    def _responses(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for tokens and log-probs [slots, longest]."""
        device = self._decoder.device
        shape = (self._max_rows, longest)
        return torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device)


def has_stop_text(response: list[int], texts: tuple[str, ...], decode: Callable[[list[int]], str]) -> bool:
    """Whether the end of a response has one of these texts in it."""
    if not texts:
        return False
    text = decode(response[-_tail(texts) :])
    return any(stop in text for stop in texts)


def _tail(texts: tuple[str, ...]) -> int:
    """A text of n characters ends within its last 4n byte tokens; a few more give the decoder its context."""
    return 4 * max(map(len, texts)) + 8


def _passes(rows: list[list[int]]) -> Iterator[slice]:
    """Cuts rows of tokens into passes of a bounded size, padding included."""
    first = longest = 0
    for row, tokens in enumerate(rows):
        longest = max(longest, len(tokens))
        if row > first and longest * (row - first + 1) > _PREFILL_TOKENS:
            yield slice(first, row)
            first, longest = row, len(tokens)
    if rows:
        yield slice(first, len(rows))
