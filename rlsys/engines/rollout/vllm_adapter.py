"""An adapter inside vLLM's processes: taken from tensors in memory, and hashed where its kernels read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import RowParallelLinear

from rlsys.engines.rollout.vllm_held import row_parts
from rlsys.engines.sync.checksum import Piece, row_hashes
from rlsys.engines.sync.verify import SyncError

_A, _B = ".lora_A.weight", ".lora_B.weight"


def use_adapter(manager: WorkerLoRAManager, number: int, tensors: dict[str, torch.Tensor]) -> None:
    """Has ``manager`` apply this adapter under this number, and no other.

    Args:
        tensors: ``LAYER.lora_A.weight`` [rank, in] and ``LAYER.lora_B.weight`` [out, rank] by Hugging Face name, the
            second times the adapter's scale.

    Raises:
        ValueError: a layer is not one that vLLM applies adapters to.
    """
    inner: Any = manager._adapter_manager
    names = {name.removesuffix(_A).removesuffix(_B) for name in tensors}
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_A))
    helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=sorted(names))
    mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        number,
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    manager._adapter_manager.remove_all_adapters()
    inner.add_adapter(adapter)
    inner.activate_adapter(number)
    inner.rlsys_layers = dict.fromkeys(names, rank)


def adapter_pieces(manager: WorkerLoRAManager) -> Iterator[Piece]:
    """Of A and B of every layer as this rank's kernels read them; none before the first adapter. Fused layers keep one
    pair for each of their parts, in larger tensors whose rest is 0.

    Raises:
        SyncError: there is no adapter where one was put, or there is more to it than was put there.
    """
    inner: Any = manager._adapter_manager
    layers: dict[str, int] = getattr(inner, "rlsys_layers", {})
    if not layers:
        return
    slots = [slot for slot, number in enumerate(inner.lora_index_to_id) if number is not None]
    if len(slots) != 1:
        raise SyncError(f"the sampler applies {len(slots)} adapters, and was sent one")
    for path, module in inner.modules.items():
        parent, _, leaf = path.rpartition(".")
        parts = inner.packed_modules_mapping.get(leaf) or [leaf]
        first = torch.empty(sum(stack.shape[2] for stack in module.lora_b_stacked))
        for i, (part, rows) in enumerate(zip(parts, row_parts(module.base_layer, first), strict=True)):
            name = f"{parent}.{part}"
            a, b = (stack[i][slots[0], 0] for stack in (module.lora_a_stacked, module.lora_b_stacked))
            if name in layers:
                yield from _pair(name, layers[name], module.base_layer, a, b, rows)
            elif a.any() or b.any():
                raise SyncError(f"the sampler applies an adapter to {name}, and was sent none for it")


def _pair(
    name: str, rank: int, base: Any, a: torch.Tensor, b: torch.Tensor, rows: tuple[int, int, int, int]
) -> Iterator[Piece]:
    if a[rank:].any() or b[:, rank:].any():
        raise SyncError(f"the sampler's adapter of {name} has a higher rank than the one that it was sent")
    kind = str(a.dtype).removeprefix("torch.")
    whole_width, width, column = a.shape[1], a.shape[1], 0
    if isinstance(base, RowParallelLinear):
        whole_width, column = int(base.input_size), base.tp_rank * width
    hashes = row_hashes(a[:rank], column, whole_width)
    yield Piece(name + _A, kind, (rank, whole_width), 0, width, hashes.cpu().numpy().tobytes())
    total, start, _, _ = rows
    hashes = row_hashes(b[:, :rank])
    yield Piece(name + _B, kind, (total, rank), start, rank, hashes.cpu().numpy().tobytes())
