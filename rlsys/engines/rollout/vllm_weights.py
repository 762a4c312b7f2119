"""What runs inside vLLM's processes: taking new weights from shared memory and saying what the model then holds.

Only names, offsets and hashes travel over vLLM's message channel; tensors lie in shared memory that the sender opened,
so nothing is pickled and nothing is left behind when a process is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import astuple
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlsys.engines.rollout.vllm_adapter import adapter_pieces, use_adapter
from rlsys.engines.rollout.vllm_held import held_pieces, remember_packed_weights
from rlsys.engines.rollout.vllm_sleep import Sleeper
from rlsys.engines.storages import used_bytes
from rlsys.engines.sync.broadcast import Listener, Meeting
from rlsys.engines.sync.buckets import Entry
from rlsys.engines.sync.cuda_ipc import IpcBucket, IpcHandle, IpcReceiver, gpu_uuid
from rlsys.engines.sync.shared_memory import SharedBucket


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed; vLLM's core would wait for ever.

    Does nothing in a process that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="rlsys-end-with-parent", daemon=True).start()


# At import, because vLLM imports this module before it loads the model and calls nothing of it until it is ready: a
# sender that is killed meanwhile would leave the core behind. (Killed before that, while the core still waits for its
# first message, vLLM's own limit of five minutes ends it.)
_end_with_parent()
remember_packed_weights()


class WeightReceiver:
    """Mixed into vLLM's worker (``worker_extension_cls``); its methods are called by name through ``collective_rpc``,
    on every rank of the sampler.

    vLLM loads a layer only when all its tensors are there, so one update may come in several buckets that cut a fused
    layer in two; what a layer still waits for keeps its bucket's memory mapped.
    """

    vllm_config: Any
    model_config: Any
    model_runner: Any
    rank: int
    device: torch.device

    def rlsys_prepare_pipeline(self) -> None:
        """Makes the buffer that a later stage of a pipeline receives activations in. vLLM makes it while it warms up,
        which it leaves out where nothing is compiled and the cache's size is given."""
        runner = self.model_runner
        if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
            return
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )

    def rlsys_begin_update(self) -> None:
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def rlsys_load_bucket(
        self, path: str, nbytes: int, entries: list[tuple[str, str, list[int], int]], kept: bool
    ) -> None:
        """Loads the tensors of a ``SharedBucket``, given by its fields."""
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(SharedBucket(path, nbytes, _index(entries), kept).tensors())

    def rlsys_collect_adapter(
        self, path: str, nbytes: int, entries: list[tuple[str, str, list[int], int]], kept: bool
    ) -> None:
        """Keeps a copy of the tensors of a ``SharedBucket``, given by its fields, for ``rlsys_use_adapter``."""
        bucket = SharedBucket(path, nbytes, _index(entries), kept)
        self._collected().update((name, tensor.clone()) for name, tensor in bucket.tensors())

    def rlsys_use_adapter(self, number: int) -> None:
        """Puts the adapter that was collected into the place of the one before. number: vLLM's of it."""
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            use_adapter(self.model_runner.lora_manager, number, self._collected())
        self._collected().clear()

    def _collected(self) -> dict[str, torch.Tensor]:
        collected: dict[str, torch.Tensor] = self.__dict__.setdefault("rlsys_adapter", {})
        return collected

    def rlsys_join_trainer(self, host: str, port: int, first_rank: int, world_size: int) -> None:
        """Meets the trainer, and every other rank that will receive its broadcasts."""
        self.rlsys_listener = Listener(Meeting(host, port, first_rank, world_size), self.rank, self.device)

    def rlsys_receive_broadcast(self, entries: list[tuple[str, str, list[int], int]]) -> None:
        """Loads what trainer rank 0 broadcasts. entries: name, dtype and shape of each tensor, in its order."""
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            self.rlsys_listener.receive(_index(entries), self.model_runner.get_model().load_weights)

    def rlsys_gpu(self) -> str:
        return gpu_uuid(self.device)

    def rlsys_load_ipc(
        self, handles: list[tuple[Any, ...]], entries: list[tuple[str, str, list[int], int]], nbytes: int
    ) -> None:
        """Loads an ``IpcBucket``, given by its fields; returns when its memory has been read."""
        bucket = IpcBucket(tuple(IpcHandle(*handle) for handle in handles), _index(entries), nbytes)
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(self._ipc().tensors(bucket, self.device))
        torch.cuda.synchronize(self.device)

    def _ipc(self) -> IpcReceiver:
        receiver: IpcReceiver = self.__dict__.setdefault("rlsys_ipc", IpcReceiver())
        return receiver

    def rlsys_finish_update(self) -> None:
        self._ipc().close()
        model = self.model_runner.get_model()
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            refresh_tied_head(model)

    def rlsys_sleep(self, weights: bool) -> int:
        """On a CPU: see ``Sleeper.sleep``."""
        return self._sleeper().sleep(weights=weights)

    def rlsys_make_room(self) -> None:
        """On a CPU: gives the weights memory, which new ones are then loaded into."""
        self._sleeper().make_room()

    def rlsys_wake(self) -> None:
        """On a CPU: gives the KV cache memory."""
        self._sleeper().wake()

    def rlsys_mapped(self) -> int:
        """On a GPU: bytes that vLLM's allocator has mapped for weights and cache."""
        from vllm.device_allocator.cumem import CuMemAllocator

        held = CuMemAllocator.get_instance().pointer_to_data.values()
        return sum(int(data.handle[1]) for data in held if not data.is_asleep)

    def rlsys_used(self) -> int:
        """Bytes in use: of this rank's GPU, or of this process."""
        return used_bytes(self.device)

    def _sleeper(self) -> Sleeper:
        if "rlsys_sleeper" not in self.__dict__:
            self.__dict__["rlsys_sleeper"] = Sleeper(self.model_runner.get_model(), self.model_runner.kv_caches)
        sleeper: Sleeper = self.__dict__["rlsys_sleeper"]
        return sleeper

    def rlsys_held(self) -> list[tuple[Any, ...]]:
        """The weights that this rank computes with: fields of ``Piece``."""
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            model = self.model_runner.get_model()
            pieces = list(held_pieces(model, self.model_config.dtype))
            if self.vllm_config.lora_config is not None:
                pieces += adapter_pieces(self.model_runner.lora_manager)
            return [astuple(piece) for piece in pieces]


def _index(entries: list[tuple[str, str, list[int], int]]) -> tuple[Entry, ...]:
    return tuple(Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in entries)


def refresh_tied_head(model: torch.nn.Module) -> None:
    """Gives the kernel of a tied output head the embedding's new weights. The head's own layer is sent nothing, so vLLM
    does not process it again, and on a CPU it would go on multiplying with its old packed copy."""
    head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
    if (
        isinstance(head, ParallelLMHead)
        and head.weight is getattr(embedding, "weight", None)
        and hasattr(head, "cpu_linear")
    ):
        head.quant_method.process_weights_after_loading(head)
