"""transformers' own generation as a rollout engine: no vLLM needed, slower, and bit for bit repeatable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import TorchRollout
from rlsys.engines.rollout.base import check_prompt
from rlsys.engines.rollout.noise import gumbel_noise
from rlsys.engines.rollout.stopping import end_token_ids
from rlsys.engines.sync.buckets import Parcel
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.verify import SyncError
from rlsys.environments.base import Sample, SamplingParams


@dataclass(frozen=True)
class _Request:
    token_ids: list[int]
    params: SamplingParams
    answer: asyncio.Future[Sample]


class TorchEngine:
    """One transformers model on this machine's GPU, or on its CPU; the contract is
    :class:`rlsys.engines.rollout.base.RolloutEngine`.

    Calls of ``generate`` that are made in the same turn of the event loop are one batch, rows sorted by prompt length
    and seed and cut every ``max_concurrent``: the same calls are the same batches in whatever order they were made.

    Args:
        model_path: a Hugging Face folder or hub id.
        config: the run's rollout group.
        max_length: longest prompt + response in tokens.
        threads: CPU threads of torch in this process; None: as they are.
    """

    def __init__(self, model_path: str, config: TorchRollout, *, max_length: int, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, config.dtype), trust_remote_code=False, use_safetensors=True
        )
        self.version = WeightVersion(0, 0)
        self._model = model.to(device).eval().requires_grad_(False)
        self._model.generation_config = GenerationConfig()  # the folder's own may truncate or penalise
        self._tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        self._end_ids = end_token_ids(model_path, self._tokenizer)
        self._max_length = max_length
        self._max_concurrent = config.max_concurrent
        self._waiting: list[_Request] = []
        self._runner: asyncio.Task[None] | None = None
        self._weights = asyncio.Lock()
        self._broken: str | None = None

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        check_prompt(token_ids, self._max_length)
        request = _Request(token_ids, params, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await request.answer

    async def checksum(self) -> str:
        async with self._weights:
            return await asyncio.to_thread(self._checksum)

    async def update_weights(self, buckets: Iterable[Parcel], version: WeightVersion) -> str:
        async with self._weights:
            if self._broken:
                raise SyncError(self._broken)
            try:
                await asyncio.to_thread(self._load, buckets)
            except BaseException as error:
                self._broken = (
                    f"an update to {tuple(version)} broke off half-way ({error!r}): the sampler must be restarted"
                )
                raise SyncError(self._broken) from error
            self.version = version
            return await asyncio.to_thread(self._checksum)

    async def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner
        for request in self._waiting:
            request.answer.cancel()
        self._waiting.clear()
        self.__dict__.pop("_model", None)

    async def _run(self) -> None:
        """Answers what is waiting, batch after batch, until nothing is."""
        while self._waiting:
            known = 0
            while known < len(self._waiting):  # until a whole turn of the event loop has brought no new call
                known = len(self._waiting)
                await asyncio.sleep(0)
            async with self._weights:
                batch = self._take()
                await self._answer(batch)

    def _take(self) -> list[_Request]:
        self._waiting.sort(key=lambda r: (len(r.token_ids), r.params.seed, r.token_ids))
        batch, self._waiting = self._waiting[: self._max_concurrent], self._waiting[self._max_concurrent :]
        return [request for request in batch if not request.answer.done()]

    async def _answer(self, batch: list[_Request]) -> None:
        try:
            if self._broken:
                raise SyncError(self._broken)
            samples = await asyncio.to_thread(self._generate, batch)
        except Exception as error:  # noqa: BLE001 - it is raised in every call that waits for this batch
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        for request, sample in zip(batch, samples, strict=True):
            if not request.answer.done():
                request.answer.set_result(sample)

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[Sample]:
        if not batch:
            return []
        device = self._model.device
        longest = max(len(r.token_ids) for r in batch)
        limits = [min(r.params.max_tokens, self._max_length - len(r.token_ids)) for r in batch]
        pad = self._end_ids[0] if self._end_ids else 0
        input_ids = torch.full((len(batch), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, longest - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, longest - len(request.token_ids) :] = 1
        picker = _Picker([r.params for r in batch], device)
        stopper = _Stopper([r.params for r in batch], limits, longest, self._end_ids, self._tokenizer)
        self._model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=max(limits), pad_token_id=pad),
            logits_processor=LogitsProcessorList([picker]),
            stopping_criteria=StoppingCriteriaList([stopper]),
        )
        tokens, logprobs = picker.picked()
        return [
            Sample(tokens[row][:n], logprobs[row][:n], [self.version] * n, reason)
            for row, (n, reason) in enumerate(zip(stopper.lengths, stopper.reasons, strict=True))
        ]

    def _checksum(self) -> str:
        return weights_checksum(self._model.named_parameters())

    @torch.no_grad()
    def _load(self, buckets: Iterable[Parcel]) -> None:
        missing = dict(self._model.named_parameters())
        for bucket in buckets:
            for name, tensor in bucket.tensors():
                missing.pop(name).copy_(tensor)
        if missing:
            raise ValueError(f"no new weights came for {', '.join(missing)}")


class _Picker(LogitsProcessor):
    """Turns logits into scores whose argmax is the sample, and keeps each picked token's log-prob."""

    def __init__(self, rows: list[SamplingParams], device: torch.device):
        self._temperatures = torch.tensor([p.temperature or 1.0 for p in rows], device=device)[:, None]
        self._random = torch.tensor([p.temperature > 0 for p in rows], device=device)[:, None]
        self._seeds = torch.tensor([p.seed for p in rows], dtype=torch.int64, device=device)
        self._tokens: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] raw logits → [B, V], the same at temperature 0, perturbed above."""
        logprobs = (scores.float() / self._temperatures).log_softmax(-1)
        perturbed = logprobs
        if self._random.any():
            position = torch.full_like(self._seeds, len(self._tokens))
            noise = gumbel_noise(self._seeds, position, scores.shape[-1])
            perturbed = torch.where(self._random, logprobs + noise, logprobs)
        token = perturbed.argmax(-1)
        self._tokens.append(token)
        self._logprobs.append(logprobs.gather(-1, token[:, None])[:, 0])
        return perturbed

    def picked(self) -> tuple[list[list[int]], list[list[float]]]:
        """[B][T] tokens and log-probs, what came after a row's end included."""
        return torch.stack(self._tokens, 1).tolist(), torch.stack(self._logprobs, 1).tolist()


class _Stopper(StoppingCriteria):
    """Ends each row by its own rules: end token, stop text, limit.

    lengths: [B] tokens of each response so far; reasons: [B] ``stop`` or ``length``.
    """

    def __init__(
        self,
        rows: list[SamplingParams],
        limits: list[int],
        prompt_tokens: int,
        end_ids: tuple[int, ...],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._rows, self._limits, self._start, self._tokenizer = rows, limits, prompt_tokens, tokenizer
        self._ends = [{*end_ids, *p.stop_token_ids} for p in rows]
        self._open = list(range(len(rows)))
        self.lengths = [0] * len(rows)
        self.reasons = ["length"] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """input_ids [B, prompt + response] → [B] bool, true where the row is done."""
        responses = input_ids[:, self._start :].tolist()
        still_open = []
        for row in self._open:
            self.lengths[row] = len(responses[row])
            if responses[row][-1] in self._ends[row] or self._has_stop_text(responses[row], self._rows[row].stop):
                self.reasons[row] = "stop"
            elif self.lengths[row] < self._limits[row]:
                still_open.append(row)
        self._open = still_open
        done = torch.ones(len(responses), dtype=torch.bool)
        done[still_open] = False
        return done.to(input_ids.device)

    def _has_stop_text(self, response: list[int], stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # A text of n characters ends within its last 4n byte tokens; a few more give the decoder its context.
        tail = response[-(4 * max(map(len, stop)) + 8) :]
        text = self._tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(s in text for s in stop)
