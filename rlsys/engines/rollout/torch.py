"""A transformers model as a rollout engine: no vLLM needed, and bit for bit repeatable."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import TorchRollout
from rlsys.engines.rollout.base import InFlight, Rest, check_prompt
from rlsys.engines.rollout.batching import Continuation, ContinuousBatch, Finished
from rlsys.engines.rollout.decoder import Decoder, unsupported
from rlsys.engines.rollout.stopping import end_token_ids
from rlsys.engines.rollout.whole_batches import WholeBatches
from rlsys.engines.rotary import freeze_rotation
from rlsys.engines.storages import Emptied, own, storages, used_bytes
from rlsys.engines.sync.buckets import Parcel
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.cuda_ipc import gpu_uuid
from rlsys.engines.sync.verify import SyncError
from rlsys.environments.base import Sample, SamplingParams

_QUIET_TURNS = 3  # of the event loop, until nobody is expected to call any more

_ASLEEP = "the sampler was put to sleep"

_Batch = ContinuousBatch | WholeBatches
_log = logging.getLogger(__name__)


class TorchEngine:
    """One transformers model on this machine's GPU, or on its CPU; the contract is
    :class:`rlsys.engines.rollout.base.RolloutEngine`.

    Batching is continuous (``batching.py``). Calls of ``generate`` enter when others have left, and the event loop is
    given its turns until no new call comes before decoding goes on: which calls share a step depends on the calls and
    not on the clock, so the same calls are the same arithmetic. Models that ``decoder.py`` does not know are sampled by
    transformers' ``generate``, batch after batch.

    Args:
        model_path: a Hugging Face folder or hub id.
        config: the run's rollout group.
        max_length: longest prompt + response in tokens.
        threads: CPU threads of torch in this process; None: as they are.
        sleeps: it will be put to sleep: weights lie in memory that can be given back, not in a mapped file.
    """

    def __init__(
        self,
        model_path: str,
        config: TorchRollout,
        *,
        max_length: int,
        threads: int | None = None,
        sleeps: bool = False,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, config.dtype), trust_remote_code=False, use_safetensors=True
        )
        self.version = WeightVersion(0, 0)
        self.last_update_s: dict[str, float] = {}
        self._model = model.to(device).eval().requires_grad_(False)
        if sleeps:
            own(self._model.parameters())
        freeze_rotation(self._model, max_length)
        self._model.generation_config = GenerationConfig()  # the folder's own may truncate or penalise
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        self._max_length = max_length
        self._max_concurrent = config.max_concurrent
        end_ids = end_token_ids(model_path, tokenizer)
        self._batch = self._start_batch(end_ids, _decode_with(tokenizer))
        self._waiting: list[Continuation] = []  # in the order in which they will enter
        self._arrived: list[Continuation] = []  # since the event loop last had its turns
        # By the answer that is waited for: from which token on which weights sampled.
        self._under_way: dict[asyncio.Future[Sample], list[tuple[int, WeightVersion]]] = {}
        self._runner: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # who wants the weights for themselves, at rest or between two tokens
        self._weights = asyncio.Lock()  # held while anything is under way
        self._pass = asyncio.Lock()  # held while the batch computes
        self._wanted = False  # nobody enters: somebody waits for the weights to be at rest
        self._said_finish = False
        self._broken: str | None = None
        self._asleep = self._closed = False
        self._emptied: Emptied | None = None  # the weights' memory, while it is given back
        # One thread of its own: torch keeps a team of threads for each thread that computes.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def _start_batch(self, end_ids: tuple[int, ...], decode: Callable[[list[int]], str]) -> _Batch:
        why = unsupported(self._model)
        if why is None:
            decoder = Decoder(self._model, self._max_length)
            return ContinuousBatch(decoder, self._model.config.vocab_size, self._max_concurrent, end_ids, decode)
        _log.warning("the torch engine samples with transformers' generate, in whole batches: %s", why)
        return WholeBatches(self._model, self._max_concurrent, end_ids, decode)

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        check_prompt(token_ids, self._max_length)
        if self._asleep:
            raise SyncError(_ASLEEP)
        limit = min(params.max_tokens, self._max_length - len(token_ids))
        answer: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._arrived.append(Continuation(token_ids, params, limit, answer))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        try:
            return await answer
        except asyncio.CancelledError:
            if not self._closed:
                self._batch.interrupt()  # the row leaves now, not when another one ends
            raise

    def sampled_tokens(self) -> int:
        return 0 if self._closed else self._batch.sampled

    async def gpus(self) -> list[str]:
        return [gpu_uuid(self._model.device)] if self._model.device.type == "cuda" else []

    async def checksum(self) -> str:
        async with self._at_rest():
            return await self._in_thread(self._checksum)

    async def update_weights(
        self, buckets: Iterable[Parcel], version: WeightVersion, in_flight: InFlight = "finish"
    ) -> str:
        if in_flight != "finish" and not self._batch.pauses:
            in_flight = "finish"
            if not self._said_finish:
                self._said_finish = True
                _log.warning("whole batches cannot pause: sequences under way finish before new weights are taken")
        async with self._at_rest() if in_flight == "finish" else self._between_tokens():
            if self._broken:
                raise SyncError(self._broken)
            began = time.perf_counter()
            try:
                if self._emptied is not None:
                    self._emptied.restore()
                await self._in_thread(self._load, buckets)
                if in_flight == "recompute":
                    await self._in_thread(self._batch.recompute)
                self._emptied = None
            except BaseException as error:
                self._broken = (
                    f"an update to {tuple(version)} broke off half-way ({error!r}): the sampler must be restarted"
                )
                raise SyncError(self._broken) from error
            self.version = version
            for request, tokens in self._batch.lengths():
                self._under_way[_answer(request)].append((tokens, version))
            loaded = time.perf_counter()
            checksum = await self._in_thread(self._checksum)
            self.last_update_s = {"load": loaded - began, "held_checksum": time.perf_counter() - loaded}
            return str(checksum)

    async def sleep(self, *, weights: bool = True) -> Rest:
        self._asleep = True
        self._batch.interrupt()
        async with self._at_rest():
            for request in (*self._waiting, *self._arrived):
                _refuse(request)
            self._waiting, self._arrived = [], []
            before, due = used_bytes(self._model.device), self._batch.release()
            if weights and self._emptied is None:
                self._emptied = Emptied(storages(self._held(), self._model.device.type))
                due += self._emptied.nbytes
            return Rest(before, used_bytes(self._model.device), due)

    async def wake(self) -> Rest:
        """The cache takes memory when there is something to put into it."""
        if self._emptied is not None:
            raise SyncError("the sampler was woken before it was sent the weights that it gave back")
        self._asleep = False
        used = used_bytes(self._model.device)
        return Rest(used, used)

    async def close(self) -> None:
        if self._runner is not None:
            self._batch.interrupt()
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner
        for request in (*self._waiting, *self._arrived):
            _answer(request).cancel()
        self._waiting, self._arrived = [], []
        self._thread.shutdown()
        self._closed = True
        for name in ("_batch", "_model"):
            self.__dict__.pop(name, None)

    @contextlib.asynccontextmanager
    async def _at_rest(self) -> AsyncIterator[None]:
        """Nothing is under way meanwhile; what was has ended before, and what waits goes on after."""
        async with self._changing:
            self._wanted = True
            try:
                async with self._weights:
                    yield
            finally:
                self._wanted = False

    @contextlib.asynccontextmanager
    async def _between_tokens(self) -> AsyncIterator[None]:
        """What is under way pauses meanwhile, and what waits goes on after."""
        async with self._changing:
            self._batch.interrupt()
            async with self._pass:
                yield

    async def _run(self) -> None:
        """Answers calls until there are none."""
        while True:
            await self._settle()
            if not self._waiting:
                return
            async with self._weights:
                try:
                    await self._decode()
                except Exception as error:  # noqa: BLE001 - it is raised in every call that waits for its answer
                    self._give_up(error)

    async def _decode(self) -> None:
        """Until nothing is under way and nobody may enter."""
        batch = self._batch
        while True:
            async with self._pass:  # it goes round: whoever wants in between two tokens is next
                if self._broken or self._asleep:
                    raise SyncError(self._broken or _ASLEEP)
                batch.go_on()
                if cancelled := {answer for answer in self._under_way if answer.done()}:
                    await self._in_thread(batch.drop, lambda request: _answer(request) in cancelled)
                    for answer in cancelled:
                        del self._under_way[answer]
                if self._waiting and not self._wanted and batch.room:
                    entering, self._waiting = self._waiting[: batch.room], self._waiting[batch.room :]
                    entering = [request for request in entering if not _answer(request).done()]
                    self._under_way |= {_answer(request): [(0, self.version)] for request in entering}
                    await self._reply(await self._in_thread(batch.add, entering, waiting=len(self._waiting)))
                elif len(batch):
                    await self._reply(await self._in_thread(batch.run))
                else:
                    return

    async def _reply(self, finished: list[Finished]) -> None:
        """Hands out answers, and lets those who wait for them call again."""
        for response in finished:
            answer = _answer(response.sequence)
            versions = _by_token(self._under_way.pop(answer), len(response.token_ids))
            if not answer.done():
                reason = "stop" if response.stopped else "length"
                answer.set_result(Sample(response.token_ids, response.logprobs, versions, reason))
        await self._settle()

    async def _settle(self) -> None:
        """Lets everybody call who is about to, and puts the calls in an order that does not depend on theirs."""
        known, quiet = len(self._arrived), 0
        while quiet < _QUIET_TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._arrived) == known else 0
            known = len(self._arrived)
        self._waiting += sorted(self._arrived, key=lambda r: (len(r.prompt), r.prompt, r.params.seed))
        self._arrived = []

    def _give_up(self, error: Exception) -> None:
        """``error`` is raised in every call under way; where the engine is broken, in those that wait too."""
        lost = set(self._under_way)
        if self._broken:
            lost |= {_answer(request) for request in self._waiting}
            self._waiting = []
        self._under_way = {}
        self._batch.clear()
        for answer in lost:
            if not answer.done():
                answer.set_exception(error)

    async def _in_thread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args, **kwargs))

    def _held(self) -> list[torch.Tensor]:
        """What the weights lie in; the decoder's matrices are among it."""
        return [parameter.data for parameter in self._model.parameters()]

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
        self._batch.refresh()


def _by_token(starts: list[tuple[int, WeightVersion]], tokens: int) -> list[WeightVersion]:
    """starts: first token and version of each span, in order."""
    ends = [first for first, _ in starts[1:]] + [tokens]
    return [version for (first, version), end in zip(starts, ends, strict=True) for _ in range(first, end)]


def _refuse(request: Continuation) -> None:
    if not _answer(request).done():
        _answer(request).set_exception(SyncError(_ASLEEP))


def _answer(request: Continuation) -> asyncio.Future[Sample]:
    return cast("asyncio.Future[Sample]", request.key)


def _decode_with(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode
