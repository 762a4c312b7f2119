"""What a vLLM model computes with, as hashes by Hugging Face name: fused layers cut into their parts, the vocabulary's
padding cut off, shards of a tensor-parallel rank in their place in the whole tensor.

On a GPU a layer's tensor is what its kernel reads, and is hashed where it lies. On a CPU, vLLM hands the tensor of a
linear layer or head to a matrix kernel that keeps it in a layout of its own, and drops it; and an online quantisation
keeps the rounded weights only. There, ``remember_packed_weights`` has the tensor hashed in the very call that packs
it, and the hash stays with what was packed: a kernel that an update never reached has the old hash. What that proves:

- every bit of the tensor that the kernel in use was packed from is the sender's;
- of a packed kernel, besides: what it answers to a few unit vectors, chosen anew at every packing, is bit for bit those
  columns. Damage to the packed memory in other columns goes unseen, until a later packing asks for them.

Of quantised weights it proves that the tensors which were rounded are the sender's, and nothing about the rounding. It
is tested on layers of vLLM's that can be rounded on a CPU, not yet run on a GPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rlsys.engines.sync.checksum import Piece, row_hashes
from rlsys.engines.sync.verify import SyncError

_PROBES = 8
_RECORD = "rlsys_record"
_packings = itertools.count()


@dataclass(frozen=True)
class _Record:
    """Of a tensor [out, in] that a kernel was made from. hashes [out]; columns [p]: those that the kernel will be asked
    for; values [p, out]: what it has to answer."""

    hashes: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def remember_packed_weights() -> None:
    """From now on vLLM's layers keep a record of the tensor that they pack or quantise. Call it before a model is
    loaded; a second call does nothing."""
    _wrap(UnquantizedLinearMethod, _on_kernel)
    _wrap(UnquantizedEmbeddingMethod, _on_kernel)
    for method in _subclasses(OnlineLinearBase):
        if "process_weights_after_loading" in vars(method):
            _wrap(method, _on_layer)


def _wrap(method: type, keep: Callable[[torch.nn.Module, torch.Tensor], None]) -> None:
    original = vars(method)["process_weights_after_loading"]
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def process(self: Any, layer: torch.nn.Module) -> None:
        weight = layer.weight
        original(self, layer)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and not weight.is_meta:
            keep(layer, weight.detach())

    method.process_weights_after_loading = process  # type: ignore[attr-defined]


def _on_kernel(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    kernel = getattr(layer, "cpu_linear", None)
    if isinstance(kernel, FunctionType):  # else nothing was packed: the layer multiplies with its tensor
        setattr(kernel, _RECORD, _record(layer, weight))


def _on_layer(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    if layer.weight.dtype != weight.dtype:  # a layer that is exempt from quantisation keeps its tensor
        setattr(layer, _RECORD, _record(layer, weight, probes=0))


def _record(layer: torch.nn.Module, weight: torch.Tensor, probes: int = _PROBES) -> _Record:
    generator = torch.Generator().manual_seed(next(_packings))
    columns = torch.randint(weight.shape[1], (probes,), generator=generator)
    return _Record(_row_hashes(layer, weight), columns, weight[:, columns.to(weight.device)].t().clone())


def _row_hashes(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """[rows] of a layer's tensor, as the part of the whole tensor's rows that it is."""
    if isinstance(module, RowParallelLinear) and weight.ndim == 2 and module.tp_size > 1:
        width = module.input_size_per_partition
        return row_hashes(weight, module.tp_rank * width, module.input_size)
    return row_hashes(weight)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


@torch.no_grad()
def held_pieces(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[Piece]:
    """The parts of the weights that ``model`` (one rank's) computes with. A head tied to the embedding is left out
    unless it computes with something else.

    Args:
        dtype: what floating-point tensors are cast to first: the sampler's own.

    Raises:
        SyncError: a kernel answers otherwise than by the tensor that it was packed from.
    """
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    seen: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        record = _checked_record(path, module)
        path = path.removesuffix(".base_layer")  # of a layer that vLLM puts an adapter beside
        for name, parameter in module.named_parameters(recurse=False):
            if name not in ("weight", "bias") and getattr(module, _RECORD, None) is not None:
                continue  # scales of a quantised weight
            for suffix, hashes in _computed_with(module, name, parameter.detach(), record, dtype):
                tied = seen.setdefault(id(parameter), hashes)
                if tied is hashes or not torch.equal(tied, hashes):
                    yield from _pieces(path + suffix, name, module, parameter, hashes, fused, dtype)


def _computed_with(
    module: torch.nn.Module, name: str, parameter: torch.Tensor, record: _Record | None, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hashes [rows] of what the module uses in place of ``parameter``. A second one, if an embedding looks up and
    multiplies (as somebody's head), for which it has a kernel: ``.kernel``, told apart only where the two differ."""
    looks_up = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    packed = record if name == "weight" else None
    if packed is None or looks_up:
        tensor = parameter.to(dtype) if parameter.is_floating_point() else parameter
        yield "", _row_hashes(module, tensor)
    if packed is not None:
        yield ".kernel" if looks_up else "", packed.hashes


def _checked_record(path: str, module: torch.nn.Module) -> _Record | None:
    """The module's record, after its kernel was asked for a few columns."""
    record = getattr(module, _RECORD, None) or getattr(getattr(module, "cpu_linear", None), _RECORD, None)
    if record is None or not len(record.columns):
        return record
    units = torch.zeros(len(record.columns), _width(module, record), dtype=record.values.dtype)
    units[torch.arange(len(units)), record.columns] = 1
    answer = module.quant_method.apply(module, units, bias=None)
    tiny = torch.finfo(answer.dtype).tiny  # a kernel need not keep subnormal numbers
    same = (answer == record.values) | ((answer.abs() < tiny) & (record.values.abs() < tiny))
    if not same.all():
        raise SyncError(f"the kernel of {path} does not multiply with the weights that it was given")
    return record


def _width(module: torch.nn.Module, record: _Record) -> int:
    return int(getattr(module, "input_size_per_partition", None) or module.embedding_dim)


def _pieces(
    path: str,
    name: str,
    module: torch.nn.Module,
    parameter: torch.Tensor,
    hashes: torch.Tensor,
    fused: dict[str, list[str]],
    dtype: torch.dtype,
) -> Iterator[Piece]:
    """A layer's rows as pieces of the tensors that the sender knows."""
    kind = str(dtype if parameter.is_floating_point() else parameter.dtype).removeprefix("torch.")
    width = () if name == "bias" or (parameter.ndim == 1 and parameter.numel()) else _row_shape(module, parameter)
    columns = _columns(module, width)
    parent, _, leaf = path.rpartition(".")
    names = [f"{parent}.{part}.{name}" for part in fused[leaf]] if leaf in fused else [f"{path}.{name}"]
    for full_name, (rows, first, start, stop) in zip(names, row_parts(module, hashes), strict=True):
        part = hashes[start:stop].cpu().numpy().tobytes()
        yield Piece(full_name, kind, (rows, *width), first, columns, part)


def _row_shape(module: torch.nn.Module, parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a row of the whole tensor."""
    if isinstance(module, VocabParallelEmbedding):
        return (int(module.embedding_dim),)
    if hasattr(module, "input_size") and (parameter.ndim == 2 or not parameter.numel()):
        return (int(module.input_size),)
    return tuple(parameter.shape[1:])


def _columns(module: torch.nn.Module, width: tuple[int, ...]) -> int:
    """Elements of a row that this rank holds."""
    if width and isinstance(module, RowParallelLinear):
        return int(module.input_size_per_partition)
    return int(torch.Size(width).numel())


def row_parts(module: torch.nn.Module, hashes: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Of each part of a layer: rows of the whole tensor, first row of this rank's, and where they lie here."""
    if isinstance(module, VocabParallelEmbedding):
        first, stop = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        return [(int(module.org_vocab_size), first, 0, stop - first)]
    sizes = list(getattr(module, "output_partition_sizes", [len(hashes)]))
    rank, ranks = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)
    if isinstance(module, RowParallelLinear):
        rank, ranks = 0, 1
    replicas = [1] * len(sizes)
    if isinstance(module, QKVParallelLinear):  # with more ranks than key heads some hold the same ones
        replicas = [1, module.num_kv_head_replicas, module.num_kv_head_replicas]
    parts, start = [], 0
    for size, copies in zip(sizes, replicas, strict=True):
        parts.append((size * ranks // copies, size * (rank // copies), start, start + size))
        start += size
    return parts
