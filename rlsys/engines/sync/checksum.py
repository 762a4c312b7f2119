"""One number for a set of weights, equal on sender and sampler exactly when the weights are, whatever the device.

Each tensor is cut into blocks; a block's sum Σ wᵢ·mᵢ mod 2⁶⁴ runs over its 32-bit words wᵢ with fixed odd multipliers
mᵢ, so one flipped bit always changes it, and reordered words do but for a chance of about 2⁻³². The sums, with name,
dtype and shape, go through BLAKE2. One CPU core reads more than 1 GB/s; on a GPU only the sums leave the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import torch

_BLOCK_WORDS = 1 << 16


class WeightsChecksum:
    """Accumulates named tensors, in any order; ``hexdigest`` is their checksum.

    Args:
        dtype: what floating-point tensors are cast to first: the sampler's dtype. None: as they are.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        self._dtype = dtype
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ValueError where ``name`` was added before."""
        if name in self._digests:
            raise ValueError(f"weight '{name}' was added to the checksum twice")
        self._digests[name] = tensor_digest(tensor, self._dtype)

    def through(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes ``weights`` on unchanged, adding each: a checksum of what is being sent, while it is sent."""
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        total = hashlib.blake2b(digest_size=16)
        for name in sorted(self._digests):
            total.update(f"{name}\n".encode() + self._digests[name])
        return total.hexdigest()


def weights_checksum(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> str:
    """Checksum of named tensors: by Hugging Face name, tied weights once; see :class:`WeightsChecksum`."""
    checksum = WeightsChecksum(dtype)
    for name, tensor in weights:
        checksum.add(name, tensor)
    return checksum.hexdigest()


@torch.no_grad()
def tensor_digest(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bytes:
    """16 bytes that depend on dtype, shape and every bit of ``tensor``.

    Subnormal floats count as zero and -0 as 0: matrix kernels are free not to keep them, and a sampler's weights may
    exist only in a kernel's own packed layout.
    """
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    flat = tensor.detach().reshape(-1)
    elements = _BLOCK_WORDS * 4 // flat.element_size()
    sums = [_block_sum(flat[start : start + elements]) for start in range(0, flat.numel(), elements)]
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.digest()


def _block_sum(block: torch.Tensor) -> torch.Tensor:
    """Σ wᵢ·mᵢ mod 2⁶⁴ over the 32-bit words of ``block`` [n]: a scalar int64 on its device."""
    if block.is_floating_point():
        block = torch.where(block.abs() < torch.finfo(block.dtype).tiny, torch.zeros_like(block), block)
    size = block.element_size()
    if block.numel() * size % 4:
        padding = block.new_zeros(math.ceil(block.numel() * size / 4) * 4 // size - block.numel())
        block = torch.cat([block, padding])
    words = block.contiguous().view(torch.int32)
    return (words * _multipliers(block.device)[: len(words)]).sum()


@cache
def _multipliers(device: torch.device) -> torch.Tensor:
    """[_BLOCK_WORDS] odd int64, the same on every machine (SplitMix64 of the index)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, _BLOCK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(odd.view(np.int64)).to(device)
