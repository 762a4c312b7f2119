"""vLLM's asynchronous engine as a rollout engine.

The engine core (scheduler, model, KV cache) is a process of its own that vLLM starts; this one keeps the event loop.
The core ends with this process, however it ends. New weights reach it through anonymous shared memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from transformers import AutoTokenizer
from vllm import AsyncEngineArgs
from vllm import SamplingParams as VllmSamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from rlsys.batch.versions import WeightVersion
from rlsys.config.errors import UserError
from rlsys.config.sampler import sampler_ranks
from rlsys.config.schema import LoraConfig, VllmRollout
from rlsys.engines.rollout.base import InFlight, Rest, check_prompt
from rlsys.engines.rollout.stopping import end_token_ids
from rlsys.engines.rollout.vllm_args import check_engine_args
from rlsys.engines.rollout.vllm_environment import core_environment
from rlsys.engines.rollout.vllm_memory import MOST_CONCURRENT, check_memory, concurrent_sequences
from rlsys.engines.sync.broadcast import Broadcast, Meeting
from rlsys.engines.sync.buckets import Entry, Parcel
from rlsys.engines.sync.checksum import Piece, pieces_checksum
from rlsys.engines.sync.cuda_ipc import IpcBucket
from rlsys.engines.sync.shared_memory import Segment, SharedBucket
from rlsys.engines.sync.verify import SyncError
from rlsys.environments.base import Sample, SamplingParams

_ASLEEP = "the sampler was put to sleep"
_RECEIVER = "rlsys.engines.rollout.vllm_weights.WeightReceiver"


class VllmEngine:
    """One vLLM engine on this machine's GPU, or on its CPU; see :class:`rlsys.engines.rollout.base.RolloutEngine`.

    Made by :meth:`start`, from inside the event loop that will use it.
    """

    def __init__(self, engine: AsyncLLM, *, max_length: int, end_ids: tuple[int, ...], adapts: bool = False):
        self.version = WeightVersion(0, 0)
        self._engine = engine
        self._max_length = max_length
        self._end_ids = end_ids
        self._request_ids = itertools.count()
        self._updating = asyncio.Lock()
        self._open = asyncio.Event()  # sequences may enter vLLM
        self._open.set()
        self._running: dict[str, str] = {}  # vLLM's own name of each sequence in it, by ours; "": it is on its way in
        self._again: set[str] = set()  # of them: those that will be handed to vLLM anew
        self._none_runs = asyncio.Event()
        self._none_runs.set()
        self._sampled, self._most_sampled = 0, 0
        self._salts = itertools.count(1)
        # Part of the name of every block in vLLM's prefix cache: what old weights computed, also what a sequence that
        # kept its cache still adds to it, is found by no sequence that begins later.
        self._salt = "0"
        self.last_update_s: dict[str, float] = {}
        self._broken: str | None = None
        self._adapts = adapts
        self._asleep = False
        self._away: set[str] = set()  # what of it vLLM's allocator has unmapped
        self._lost = False  # the weights' memory was given back, and no new ones have come
        self._adapter: LoRARequest | None = None  # what is sampled with, once there was an update

    @classmethod
    async def start(
        cls,
        model_path: str,
        config: VllmRollout,
        *,
        max_length: int,
        seed: int = 0,
        threads: int | None = None,
        adapter: LoraConfig | None = None,
        sleeps: bool = False,
    ) -> VllmEngine:
        """Loads the model and is ready to sample; blocks the event loop until then (about 10 s on a CPU).

        Args:
            model_path: a Hugging Face folder or hub id.
            config: the run's rollout group.
            max_length: longest prompt + response in tokens.
            seed: vLLM's own seed; each sample has one of its own besides.
            threads: CPU threads of the model's kernels; None: one a core that this process may use.
            adapter: updates are of this adapter; None: of whole weights.
            sleeps: it will be put to sleep.

        Raises:
            UserError: ``config.engine_args`` names something that vLLM lacks or rlsys decides, or vLLM refuses a value.
        """
        arguments = engine_arguments(model_path, config, max_length=max_length, seed=seed)
        if adapter is not None:
            arguments |= adapter_arguments(adapter)
        if sleeps and not current_platform.is_cpu():
            arguments["enable_sleep_mode"] = True
        threads = max(1, (threads or len(os.sched_getaffinity(0))) // sampler_ranks(config))
        with core_environment(threads, on_cpu=current_platform.is_cpu(), eager=arguments["enforce_eager"]):
            try:
                vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
                if config.max_concurrent is None:
                    arguments["max_num_seqs"] = concurrent_sequences(vllm_config, Path(model_path), config)
                    vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"vLLM refuses its arguments: {_reason(error)}",
                    where="rollout",
                    fix="check rollout.engine_args, rollout.max_concurrent, model.path and the lengths in data",
                ) from error
            check_memory(vllm_config, Path(model_path), config)
            engine = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=arguments["disable_log_stats"])
        end_ids = end_token_ids(model_path, AutoTokenizer.from_pretrained(model_path, trust_remote_code=False))
        started = cls(engine, max_length=max_length, end_ids=end_ids, adapts=adapter is not None)
        if config.pipeline_parallel > 1:
            await started._rpc("rlsys_prepare_pipeline")
        await engine.update_weight_version(str(started.version.packed()))
        return started

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        check_prompt(token_ids, self._max_length)
        wanted = self._vllm_params(params)
        while True:
            await self._open.wait()
            if self._broken or self._asleep:
                raise SyncError(self._broken or _ASLEEP)
            if (output := await self._run(token_ids, wanted)) is not None:
                return _sample(output)

    async def _run(self, token_ids: list[int], params: VllmSamplingParams) -> RequestOutput | None:
        """None: it was taken out before its first token, for new weights."""
        number = str(next(self._request_ids))
        request = tokens_input(prompt_token_ids=token_ids, cache_salt=self._salt)
        self._running[number] = ""
        self._none_runs.clear()
        try:
            queue = await self._engine.add_request(number, request, params, lora_request=self._adapter)
            self._running[number] = queue.request_id
            output = await queue.get()
            assert isinstance(output, RequestOutput)
            self._sampled += len(output.outputs[0].token_ids)
            if output.outputs[0].finish_reason in ("stop", "length"):
                return output
            if number in self._again:
                return None
        except asyncio.CancelledError:
            self._sampled += self._tokens(self._running[number])
            await self._engine.abort(number)
            raise
        finally:
            self._again.discard(number)
            del self._running[number]
            if not self._running:
                self._none_runs.set()
        raise SyncError(self._broken or (_ASLEEP if self._asleep else "the sampler gave up a sequence under way"))

    def sampled_tokens(self) -> int:
        now = self._sampled + sum(map(self._tokens, list(self._running.values())))
        self._most_sampled = max(self._most_sampled, now)  # vLLM forgets an ended sequence before its answer is counted
        return self._most_sampled

    def _tokens(self, name: str) -> int:
        """Of a sequence in vLLM, so far."""
        state = self._engine.output_processor.request_states.get(name)
        return 0 if state is None or state.detokenizer is None else int(state.detokenizer.num_output_tokens())

    async def gpus(self) -> list[str]:
        return [] if current_platform.is_cpu() else await self._rpc("rlsys_gpu")

    async def checksum(self) -> str:
        ranks = await self._rpc("rlsys_held")
        return pieces_checksum([_piece(fields) for fields in pieces] for pieces in ranks)

    async def update_weights(
        self, buckets: Iterable[Parcel], version: WeightVersion, in_flight: InFlight = "finish"
    ) -> str:
        if self._adapts and self._adapter is None:
            in_flight = "finish"  # what is under way knows of no adapter that could become another one
        async with self._updating:
            if self._broken:
                raise SyncError(self._broken)
            self._open.clear()
            try:
                began = time.perf_counter()
                await self._pause(in_flight)
                try:
                    paused = time.perf_counter()
                    if self._asleep:
                        await self._make_room()
                    await (self._load_adapter(buckets) if self._adapts else self._load(buckets))
                    loaded = time.perf_counter()
                    checksum = await self.checksum()
                    await self._engine.update_weight_version(str(version.packed()))
                except BaseException as error:
                    self._broken = (
                        f"an update to {tuple(version)} broke off half-way ({error!r}): the sampler must be restarted"
                    )
                    await self._engine.pause_generation(mode="abort", clear_cache=False)
                    raise SyncError(self._broken) from error
                self.version, self._lost, self._salt = version, False, str(next(self._salts))
                self.last_update_s = {
                    "pause": paused - began,
                    "load": loaded - paused,
                    "held_checksum": time.perf_counter() - loaded,
                }
                if not self._asleep:
                    await self._engine.resume_generation()
                return checksum
            finally:
                self._open.set()

    async def _pause(self, in_flight: InFlight) -> None:
        """Nothing is computed from here on. A sequence without a token has not begun: it will be handed to vLLM anew,
        because a block of its prompt might be found in the cache that old weights computed."""
        while "" in self._running.values():
            await asyncio.sleep(0)
        if in_flight == "finish":
            # Not vLLM's own waiting: it would hold back a sequence that it has set aside for want of memory.
            await self._take_out_unbegun()
            await self._none_runs.wait()
            await self._engine.pause_generation(mode="wait", clear_cache=True)
        else:
            await self._engine.pause_generation(mode="keep", clear_cache=in_flight == "recompute")
            await self._take_out_unbegun()

    async def _take_out_unbegun(self) -> None:
        unbegun = [number for number, name in self._running.items() if not self._tokens(name)]
        self._again.update(unbegun)
        await self._engine.abort(unbegun)

    async def sleep(self, *, weights: bool = True) -> Rest:
        """On GPUs an adapter's base, which nobody sends anew, waits in main memory; on a CPU it stays."""
        async with self._updating:
            self._asleep = True
            weights = weights and not self._lost
            before = await self._used()
            await self._engine.pause_generation(mode="abort", clear_cache=True)
            due = 0
            if current_platform.is_cpu():
                weights = weights and not self._adapts
                due = sum(await self._rpc("rlsys_sleep", weights))
            else:
                due = sum(await self._rpc("rlsys_mapped"))
                if weights:
                    await self._engine.sleep(level=1 if self._adapts else 2)
                    self._away = {"weights", "kv_cache"}
                elif not self._away:
                    await self._engine.release_kv_cache_memory()
                    self._away = {"kv_cache"}
                due -= sum(await self._rpc("rlsys_mapped"))
            self._lost = self._lost or (weights and not self._adapts)
            return Rest(before, await self._used(), due)

    async def wake(self) -> Rest:
        async with self._updating:
            if self._broken or self._lost:
                raise SyncError(
                    self._broken or "the sampler was woken before it was sent the weights that it gave back"
                )
            before = await self._used()
            if self._asleep:
                if current_platform.is_cpu():
                    await self._rpc("rlsys_wake")
                elif self._away:
                    await self._engine.wake_up(sorted(self._away))
                    self._away = set()
                await self._engine.resume_generation()
                self._asleep = False
            return Rest(before, await self._used())

    async def _make_room(self) -> None:
        """The weights get memory, the cache does not yet: until the trainer has left there may be none for it."""
        if current_platform.is_cpu():
            await self._rpc("rlsys_make_room")
        elif "weights" in self._away:
            await self._engine.wake_up(["weights"])
            self._away.remove("weights")

    async def _used(self) -> int:
        return sum(await self._rpc("rlsys_used"))

    async def close(self) -> None:
        engine = self.__dict__.pop("_engine", None)  # vLLM's finaliser must not be left to the interpreter's exit
        if engine is not None:
            engine.shutdown()

    async def join_trainer(self, meeting: Meeting) -> None:
        """Every rank of this sampler meets trainer rank 0, which will broadcast weights to it."""
        await self._rpc("rlsys_join_trainer", *dataclasses.astuple(meeting))

    async def _load(self, parcels: Iterable[Parcel]) -> None:
        await self._rpc("rlsys_begin_update")
        iterator = iter(parcels)
        # In a thread: the next one may be handed over by another call of this event loop.
        while (parcel := await asyncio.to_thread(next, iterator, None)) is not None:
            if isinstance(parcel, IpcBucket):
                handles = [dataclasses.astuple(handle) for handle in parcel.handles]
                await self._rpc("rlsys_load_ipc", handles, _entries(parcel.entries), parcel.nbytes)
            elif isinstance(parcel, Broadcast):
                await self._rpc("rlsys_receive_broadcast", _entries(parcel.index))
            elif isinstance(parcel, SharedBucket):
                await self._load_shared(parcel)
            else:
                with _in_shared_memory(parcel) as bucket:
                    await self._load_shared(dataclasses.replace(bucket, kept=False))
        await self._rpc("rlsys_finish_update")

    async def _load_shared(self, bucket: SharedBucket, method: str = "rlsys_load_bucket") -> None:
        await self._rpc(method, bucket.path, bucket.nbytes, _entries(bucket.entries), bucket.kept)

    async def _load_adapter(self, parcels: Iterable[Parcel]) -> None:
        """It is always the same one to vLLM, so that sequences under way go on with what it has become."""
        for parcel in parcels:
            if isinstance(parcel, SharedBucket):
                await self._load_shared(parcel, "rlsys_collect_adapter")
            else:
                with _in_shared_memory(parcel) as bucket:
                    await self._load_shared(dataclasses.replace(bucket, kept=False), "rlsys_collect_adapter")
        self._adapter = LoRARequest("adapter", 1, "sent by the trainer")
        await self._rpc("rlsys_use_adapter", self._adapter.lora_int_id)

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """By rank of the sampler."""
        return list(await self._engine.collective_rpc(method, args=args))

    def _vllm_params(self, params: SamplingParams) -> VllmSamplingParams:
        return VllmSamplingParams(
            temperature=params.temperature,
            max_tokens=params.max_tokens,
            seed=params.seed,
            stop=list(params.stop),
            stop_token_ids=sorted({*self._end_ids, *params.stop_token_ids}),
            # Neutral by name, so that no default of a model or of vLLM ever truncates the distribution.
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            logprobs=0,  # of the sampled token only
            detokenize=bool(params.stop),
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )


def engine_arguments(model_path: str, config: VllmRollout, *, max_length: int, seed: int) -> dict[str, Any]:
    """vLLM's engine arguments for a training sampler: what ``config`` says, over it what the contract demands."""
    check_engine_args(config.engine_args, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
    if current_platform.is_cpu():
        memory: dict[str, Any] = {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    else:
        memory = {"gpu_memory_utilization": config.gpu_memory_fraction}
    # Graphs and compilation make decoding on a GPU faster; on a CPU they make the start longer, and little else.
    defaults = {
        "enforce_eager": current_platform.is_cpu(),
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    owned = {
        "model": model_path,
        "dtype": config.dtype,
        "seed": seed,
        "max_model_len": max_length,
        "max_num_seqs": config.max_concurrent or MOST_CONCURRENT[not current_platform.is_cpu()],
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "trust_remote_code": False,
        "worker_extension_cls": _RECEIVER,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
    }
    if sampler_ranks(config) > 1:
        owned["distributed_executor_backend"] = "mp"
    return {**defaults, **config.engine_args, **memory, **owned}


def adapter_arguments(adapter: LoraConfig) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter at a time.

    Raises:
        UserError: vLLM has no room for its rank.
    """
    room = [rank for rank in get_args(MaxLoRARanks) if rank >= adapter.rank]
    if not room:
        raise UserError(
            f"vLLM applies adapters up to rank {max(get_args(MaxLoRARanks))}",
            where="model.lora.rank",
            fix="choose a smaller rank, or model.lora.sync=merged",
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(room),
        "lora_target_modules": list(adapter.targets),
    }


@contextmanager
def _in_shared_memory(parcel: Parcel) -> Iterator[SharedBucket]:
    """The parcel where vLLM's processes can map it."""
    segment = Segment()
    try:
        for _ in segment.write(parcel.tensors()):
            pass
        yield segment.bucket()
    finally:
        segment.release()


def _entries(entries: Iterable[Entry]) -> list[tuple[Any, ...]]:
    """As they go over vLLM's message channel."""
    return [(e.name, e.dtype, list(e.shape), e.offset) for e in entries]


def _piece(fields: Sequence[Any]) -> Piece:
    """From its fields, as they come over vLLM's message channel."""
    name, dtype, shape, *rest = fields
    return Piece(name, dtype, tuple(shape), *rest)


def _reason(error: Exception) -> str:
    """vLLM's own words, without the dump of all arguments that pydantic puts around them."""
    if isinstance(error, ValidationError):
        return "; ".join(detail["msg"] for detail in error.errors())
    return str(error)


def _sample(output: RequestOutput) -> Sample:
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    logprobs = [step[token].logprob for token, step in zip(token_ids, completion.logprobs, strict=True)]
    versions = [
        WeightVersion.unpack(int(span.version))
        for span in completion.weight_versions
        for _ in range(span.start, span.end)
    ]
    return Sample(token_ids, logprobs, versions, completion.finish_reason)
