"""What runs inside vLLM's core process: taking new weights from shared memory and reading back what the model holds.

Only names, offsets and checksums travel over vLLM's message channel; tensors lie in anonymous shared memory that the
sender opened, so nothing is pickled and nothing is left behind when a process is killed.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlsys.engines.sync.buckets import Bucket, Entry
from rlsys.engines.sync.checksum import tensor_digest, weights_checksum


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


class WeightReceiver:
    """Mixed into vLLM's worker (``worker_extension_cls``); its methods are called by name through ``collective_rpc``.

    vLLM loads a layer only when all its tensors are there, so one update may come in several buckets that cut a fused
    layer in two; what a layer still waits for keeps its bucket's memory mapped.
    """

    vllm_config: Any
    model_config: Any
    model_runner: Any

    def rlsys_begin_update(self) -> None:
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def rlsys_load_bucket(self, path: str, entries: list[tuple[str, str, list[int], int]]) -> None:
        """Loads the tensors of one bucket.

        Args:
            path: the sender's shared memory, as a path that this process can open.
            entries: name, dtype, shape and byte offset of each tensor.
        """
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        index = tuple(Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in entries)
        bucket = Bucket(np.frombuffer(memory, dtype=np.uint8), index)
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(bucket.tensors())

    def rlsys_finish_update(self) -> str:
        """Returns the checksum of the weights that the model now holds."""
        model = self.model_runner.get_model()
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            refresh_tied_head(model)
        return self.rlsys_checksum()

    def rlsys_checksum(self) -> str:
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            return weights_checksum(held_weights(self.model_runner.get_model()), self.model_config.dtype)


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


def held_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that ``model`` computes with, by Hugging Face name: fused layers cut into their parts, the
    vocabulary's padding cut off. A head tied to the embedding is left out unless it computes with something else.

    On a CPU, vLLM hands the weight of a linear layer or head to a matrix kernel that keeps it in a layout of its own,
    and drops the layer's tensor; there the weight is read back by sending the identity through the layer, which returns
    it exactly.
    """
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = _held(module, name, parameter.detach())
            if id(parameter) in seen and tensor_digest(tensor) == tensor_digest(_unpadded(module, parameter.detach())):
                continue
            seen.add(id(parameter))
            parent, _, leaf = path.rpartition(".")
            if leaf not in fused:
                yield f"{path}.{name}", tensor
                continue
            for part, piece in zip(fused[leaf], tensor.split(list(module.output_partition_sizes)), strict=True):
                yield f"{parent}.{part}.{name}", piece


def _held(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """What ``module`` computes with in place of ``parameter``."""
    if name == "weight" and isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
        parameter = _through_kernel(module, parameter.shape[1], parameter)
    elif name == "weight" and parameter.numel() == 0:
        parameter = _through_kernel(module, module.input_size_per_partition, parameter)
    return _unpadded(module, parameter)


def _unpadded(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    return weight[: module.org_vocab_size] if isinstance(module, VocabParallelEmbedding) else weight


def _through_kernel(module: torch.nn.Module, inputs: int, like: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] that the layer multiplies with: W·I, in which every sum has one term that is not zero."""
    identity = torch.eye(inputs, dtype=like.dtype, device=like.device)
    return module.quant_method.apply(module, identity, bias=None).t()
