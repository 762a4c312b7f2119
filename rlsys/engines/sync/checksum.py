"""One number for a set of weights, equal on sender and sampler exactly when the weights are, whatever the device and
however many ranks the sampler is cut over.

Each row of a tensor (everything behind its first dimension) has a hash Σ wᵢ·mᵢ mod 2⁶⁴ over its words wᵢ with fixed odd
multipliers mᵢ, so one flipped bit always changes it and another change does but for a chance of about 2⁻⁶⁴. Hashes of
column shards add up to those of the whole row, those of row shards are laid one behind the other; then, with name,
dtype and shape, they go through BLAKE2. A CPU reads weights at the rate of its memory; from a GPU only the hashes
leave.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

_WORD = 8
_MOST_RANKS = 64  # a column shard of so many ranks still begins at a word
_DEVICE_WORDS = 1 << 22  # products that exist at once where there is no integer matrix-vector kernel


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
        self.add_digest(name, tensor_digest(tensor, self._dtype))

    def add_digest(self, name: str, digest: bytes) -> None:
        """Adds a tensor by its ``tensor_digest``. Raises ValueError where ``name`` was added before."""
        if name in self._digests:
            raise ValueError(f"weight '{name}' was added to the checksum twice")
        self._digests[name] = digest

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


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that one rank of a sampler holds.

    dtype, shape: of the whole tensor; first_row: of the part's rows in it; columns: how many of a row's elements the
    part has; hashes: ``row_hashes`` of the part, int64 as bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int
    columns: int
    hashes: bytes


def weights_checksum(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> str:
    """Checksum of named tensors: by Hugging Face name, tied weights once; see :class:`WeightsChecksum`."""
    checksum = WeightsChecksum(dtype)
    for name, tensor in weights:
        checksum.add(name, tensor)
    return checksum.hexdigest()


def pieces_checksum(ranks: Iterable[Iterable[Piece]]) -> str:
    """``weights_checksum`` of the tensors that ``ranks`` hold together. What two ranks hold alike counts once.

    Raises:
        ValueError: two ranks differ where they hold the same, or part of a tensor is held by none.
    """
    found: dict[str, _Assembly] = {}
    for pieces in ranks:
        for piece in pieces:
            found.setdefault(piece.name, _Assembly(piece)).add(piece)
    checksum = WeightsChecksum()
    for name, assembly in found.items():
        checksum.add_digest(name, assembly.digest())
    return checksum.hexdigest()


class _Assembly:
    """Pieces of one tensor on their way to its digest."""

    def __init__(self, first: Piece):
        self._name, self._dtype, self._shape = first.name, first.dtype, first.shape
        rows, self._columns = matrix_shape(first.shape)
        self._sums = np.zeros(rows, dtype=np.int64)
        self._covered = np.zeros(rows, dtype=np.int64)
        self._seen: set[tuple[int, int, bytes]] = set()

    def add(self, piece: Piece) -> None:
        if (piece.dtype, piece.shape) != (self._dtype, self._shape):
            raise ValueError(f"ranks of the sampler differ in dtype or shape of '{self._name}'")
        key = (piece.first_row, piece.columns, piece.hashes)
        if key in self._seen and piece.columns == self._columns:
            return  # the same rows, held twice
        self._seen.add(key)
        hashes = np.frombuffer(piece.hashes, dtype=np.int64)
        rows = slice(piece.first_row, piece.first_row + len(hashes))
        with np.errstate(over="ignore"):
            self._sums[rows] += hashes
        self._covered[rows] += piece.columns

    def digest(self) -> bytes:
        if (self._covered != self._columns).any():
            raise ValueError(f"ranks of the sampler hold '{self._name}' in part, or differ in a part that two hold")
        return _digest(self._dtype, self._shape, self._sums.tobytes())


@torch.no_grad()
def tensor_digest(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bytes:
    """16 bytes that depend on dtype, shape and every bit of ``tensor``."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    hashes = row_hashes(tensor).cpu().numpy().tobytes()
    return _digest(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), hashes)


def _digest(dtype: str, shape: tuple[int, ...], hashes: bytes) -> bytes:
    return hashlib.blake2b(f"{dtype} {tuple(shape)}".encode() + hashes, digest_size=16).digest()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, elements of a row) that a tensor is hashed as: a vector has one element a row, a scalar is one row."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@torch.no_grad()
def row_hashes(tensor: torch.Tensor, first_column: int = 0, columns: int | None = None) -> torch.Tensor:
    """[rows] int64 on the tensor's device; of a column shard they are terms of the whole rows' hashes.

    Args:
        tensor: [rows, …] of any dtype.
        first_column: of the shard in the whole row. columns: elements of a whole row; None: the tensor has them all.

    Raises:
        ValueError: the shard begins inside a word of the whole row.
    """
    rows, width = matrix_shape(tuple(tensor.shape))
    if not tensor.numel():
        return torch.zeros(rows, dtype=torch.int64, device=tensor.device)
    size, whole = tensor.element_size(), width if columns is None else columns
    flat = tensor.detach().contiguous().reshape(rows, width)
    if whole * size % (_WORD * _MOST_RANKS):
        words, first = _bits(flat), first_column
    elif first_column * size % _WORD or width * size % _WORD:
        raise ValueError(f"a shard of {width} columns from {first_column} on does not begin and end at a word")
    else:
        words, first = _as_words(flat), first_column * size // _WORD
    return _weighted_sums(words, _multipliers(first + words.shape[1], tensor.device)[first:])


def _as_words(flat: torch.Tensor) -> torch.Tensor:
    """[rows, bytes / 8] int64, a view where memory is aligned."""
    if flat.data_ptr() % _WORD:
        flat = flat.clone()
    return flat.view(torch.int64)


def _bits(flat: torch.Tensor) -> torch.Tensor:
    """[rows, width] int64: each element's bits."""
    if flat.dtype == torch.bool:
        flat = flat.view(torch.uint8)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(integer).to(torch.int64)


def _weighted_sums(words: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """[rows] Σⱼ words[i, j] · multipliers[j] mod 2⁶⁴."""
    if words.device.type == "cpu":
        return torch.mv(words, multipliers)
    rows = max(1, _DEVICE_WORDS // words.shape[1])
    return torch.cat([(part * multipliers).sum(1) for part in words.split(rows)])


def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    """[count] odd int64, the same on every machine (SplitMix64 of the index)."""
    return _table(1 << max(count - 1, 1).bit_length(), device)[:count]


@lru_cache(maxsize=32)
def _table(count: int, device: torch.device) -> torch.Tensor:
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(odd.view(np.int64)).to(device)
