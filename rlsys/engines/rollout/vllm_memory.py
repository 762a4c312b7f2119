"""Whether a sampler can hold its weights and the cache of its longest sequence: asked before anything is loaded,
because loading takes minutes and vLLM's own refusal comes after it, from another process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from rlsys.config.errors import UserError
from rlsys.config.sampler import MOST_CONCURRENT, sampler_ranks
from rlsys.config.schema import VllmRollout
from rlsys.engines.footprint import free_and_total, gib

_GIB = 2**30


def check_memory(vllm_config: VllmConfig, folder: Path, config: VllmRollout) -> None:
    """Refuses a sampler that does not fit.

    Args:
        folder: of the model; weights of one that is not on this machine yet are not counted.

    Raises:
        UserError: what is missing, in GiB, and which key gives it.
    """
    sequence, weights = sequence_bytes(vllm_config), _weights_of_rank(vllm_config, folder, config)
    length = vllm_config.model_config.max_model_len
    if current_platform.is_cpu():
        cache = int(config.kv_cache_gib * _GIB)
        if cache < sequence:
            raise UserError(
                f"a sequence of {length} tokens needs {gib(sequence)} GiB of KV cache, and it has {gib(cache)}: "
                f"{gib(sequence - cache)} GiB are missing",
                where="rollout.kv_cache_gib",
                fix=f"set rollout.kv_cache_gib={gib(sequence)} or more, or shorten data.max_response_tokens",
            )
        ranks = sampler_ranks(config)  # all of them are on this machine
        _refuse_shortage(
            (weights + cache) * ranks, free_and_total(torch.device("cpu"))[0], "memory is free", "rollout.kv_cache_gib"
        )
        return
    _refuse_shortage(
        weights + sequence, _gpu_share(config), "of each GPU is the sampler's", "rollout.gpu_memory_fraction"
    )


def concurrent_sequences(vllm_config: VllmConfig, folder: Path, config: VllmRollout) -> int:
    """How many sequences to decode at once where ``rollout.max_concurrent`` does not say: four times as many as the
    cache has room for at their longest, because few are; vLLM itself decodes no more of them than there is room for. At
    most 256 on a CPU and 1,024 on a GPU, where more make a step longer and tokens no faster."""
    if current_platform.is_cpu():
        room, most = int(config.kv_cache_gib * _GIB), MOST_CONCURRENT[0]
    else:
        room, most = _gpu_share(config) - _weights_of_rank(vllm_config, folder, config), MOST_CONCURRENT[1]
    return max(1, min(most, 4 * room // sequence_bytes(vllm_config)))


def _gpu_share(config: VllmRollout) -> int:
    free, total = free_and_total(torch.device("cuda"))
    return min(free, int(total * config.gpu_memory_fraction))


def _weights_of_rank(vllm_config: VllmConfig, folder: Path, config: VllmRollout) -> int:
    weights = math.ceil(weights_bytes(folder, vllm_config.model_config.dtype) / sampler_ranks(config))
    # From bfloat16 to 8 bits; what stays unrounded is small.
    return weights if vllm_config.model_config.quantization is None else weights // 2


def _refuse_shortage(needed: int, available: int, whose: str, key: str) -> None:
    if needed > available:
        raise UserError(
            f"the sampler needs {gib(needed)} GiB for weights and KV cache, and {gib(available)} GiB {whose}: "
            f"{gib(needed - available)} GiB are missing",
            where=key,
            fix="choose a smaller model, rollout.dtype=bfloat16, rollout.tensor_parallel, or more of the memory",
        )


def sequence_bytes(vllm_config: VllmConfig) -> int:
    """KV cache of one sequence of the longest length, on one rank."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    heads, size = model.get_num_kv_heads(parallel), model.get_head_size()
    element = 1 if cache.cache_dtype.startswith("fp8") else torch.empty(0, dtype=model.dtype).element_size()
    blocks = math.ceil(model.max_model_len / cache.block_size)
    layers = model.get_num_layers(parallel)
    return 2 * layers * heads * size * element * blocks * cache.block_size


def weights_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of the folder's safetensors files, once they are ``dtype``; 0 where there is no such folder."""
    elements = sum(math.prod(tensor["shape"]) for tensor in _tensors(folder))
    return elements * torch.empty(0, dtype=dtype).element_size()


def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Entries of the files' headers (https://huggingface.co/docs/safetensors)."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from (entry for name, entry in header.items() if name != "__metadata__")
