"""Logits tile by tile: how [tokens, vocabulary] is cut, memory for a tile, and the passes over it.

The passes are torch operations here and Triton kernels in ``logprob.py``, with the same arguments and meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlsys.algorithms.kernels import use_kernels


@dataclass(frozen=True)
class _Size:
    """tokens: at most, unless the vocabulary is small. elements: tokens · words, about. words: at least, where there
    are as many."""

    tokens: int
    elements: int
    words: int


# Measured: a CPU's matrix products reach their full speed from about 512 × 1,024 on, and passes over a tile of 16 MiB
# in float32 cost little more than over one that the cache holds. Smaller ones would be more of them, and after each the
# threads wait for each other: milliseconds, where other programs run on the same cores. A GPU's tile is large enough
# that starting kernels takes little of the time.
_CPU = _Size(tokens=1024, elements=1 << 22, words=1024)
_GPU = _Size(tokens=4096, elements=1 << 25, words=8192)


@dataclass(frozen=True)
class Tiles:
    """How the logits are cut: a tile is one of ``tokens`` by one of ``words``."""

    tokens: list[slice]
    words: list[slice]

    @classmethod
    def of(cls, hidden: torch.Tensor, weight: torch.Tensor, chunk: int | None) -> Tiles:
        """chunk: tokens in a tile, at most; None: what was measured best for the device."""
        size = _GPU if hidden.is_cuda else _CPU
        tokens = even_slices(len(hidden), chunk or max(size.tokens, size.elements // max(1, len(weight))))
        longest = tokens[0].stop if tokens else 1
        return cls(tokens, even_slices(len(weight), max(size.words, size.elements // longest)))

    @property
    def elements(self) -> int:
        """Of the largest tile, which is the first."""
        return self.tokens[0].stop * self.words[0].stop if self.tokens else 0


def even_slices(total: int, most: int) -> list[slice]:
    """Slices of 0 … total of about the same size, none larger than the first, as few as ``most`` allows."""
    if total <= most:
        return [slice(0, total)] if total else []
    size = -(-total // -(-total // most))
    size = min(most, -(-size // 16) * 16)  # whole vectors
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@dataclass(frozen=True)
class Running:
    """What log-prob and entropy need of the words so far, [n] each.

    With z = logits / temperature: top = max z, total = Σ exp(z − top), weighted = Σ exp(z − top) (z − top), and
    target = z at the target, once that was met (NaN before).
    """

    top: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor
    target: torch.Tensor

    @classmethod
    def start(cls, tokens: int, dtype: torch.dtype, device: torch.device) -> Running:
        # The maximum is not −inf yet: words that are all impossible (a bias of −inf) leave the sums finite.
        values = (torch.finfo(dtype).min / 2, 0.0, 0.0, torch.nan)
        return cls(*(torch.full((tokens,), value, dtype=dtype, device=device) for value in values))

    def __getitem__(self, part: slice) -> Running:
        return Running(self.top[part], self.total[part], self.weighted[part], self.target[part])


@dataclass(frozen=True)
class Known:
    """What the gradient of the logits needs of each token, [n] each.

    log_z and entropy: of the softmax. grad_logprobs and grad_entropy: gradients of the loss, divided by the temperature
    (grad_entropy None: the entropy has none).
    """

    log_z: torch.Tensor
    entropy: torch.Tensor
    grad_logprobs: torch.Tensor
    grad_entropy: torch.Tensor | None

    def __getitem__(self, part: slice) -> Known:
        grad_entropy = None if self.grad_entropy is None else self.grad_entropy[part]
        return Known(self.log_z[part], self.entropy[part], self.grad_logprobs[part], grad_entropy)


class Workspace:
    """Memory for one tile, and without kernels for another one beside it, used for every tile again: fresh memory of
    that size costs a CPU more than the arithmetic on it."""

    def __init__(self, tiles: Tiles, hidden: torch.Tensor, temperature: float, kernels: bool | None):
        """kernels: whether Triton makes the passes over a tile; None: on CUDA devices where it is installed."""
        self._temperature = temperature
        self._triton: Any = None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if use_kernels(hidden) if kernels is None else kernels:
            from rlsys.algorithms.kernels import logprob

            self._triton, dtype = logprob, hidden.dtype
        self._tile = torch.empty(tiles.elements, dtype=dtype, device=hidden.device)
        self._beside = self._tile if self._triton else torch.empty_like(self._tile)

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[n, w], before the temperature; in float32 at least unless kernels read it."""
        tile = self._tile[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if hidden.dtype != tile.dtype:
            return tile.copy_(torch.nn.functional.linear(hidden, weight, bias))
        if bias is None:
            return torch.mm(hidden, weight.T, out=tile)
        return torch.addmm(bias, hidden, weight.T, out=tile)

    def fold(self, tile: torch.Tensor, targets: torch.Tensor, first: int, running: Running) -> None:
        """Takes the tile [n, w], words ``first`` … of the vocabulary, into the running numbers, and spoils it."""
        if self._triton:
            self._triton.fold(tile, targets, first, self._temperature, running)
            return
        if self._temperature != 1.0:
            tile.div_(self._temperature)
        here, column = _columns(targets, first, tile.shape[1])
        torch.where(here, tile.gather(1, column[:, None])[:, 0], running.target, out=running.target)
        top = torch.maximum(running.top, tile.amax(-1))
        moved = running.top - top
        tile.sub_(top[:, None])
        exponentials = torch.exp(tile, out=self._beside[: tile.numel()].view(tile.shape))
        # Sums so far are relative to the old maximum; in ``weighted`` the maximum is a term as well.
        running.weighted.addcmul_(running.total, moved).mul_(moved.exp())
        running.total.mul_(moved.exp()).add_(exponentials.sum(-1))
        running.weighted.add_(exponentials.mul_(tile).sum(-1))
        running.top.copy_(top)

    def gradient(self, tile: torch.Tensor, targets: torch.Tensor, first: int, known: Known) -> torch.Tensor:
        """The gradient of the logits (before the temperature) in the tile's place."""
        if self._triton:
            self._triton.gradient(tile, targets, first, self._temperature, known)
            return tile
        if self._temperature != 1.0:
            tile.div_(self._temperature)
        tile.sub_(known.log_z[:, None])
        if known.grad_entropy is None:
            tile.exp_().mul_(-known.grad_logprobs[:, None])
        else:  # dH/dlogits = −p (log p + H)
            p = torch.exp(tile, out=self._beside[: tile.numel()].view(tile.shape))
            tile.add_(known.entropy[:, None]).mul_(-known.grad_entropy[:, None]).sub_(known.grad_logprobs[:, None])
            tile.mul_(p)
        here, column = _columns(targets, first, tile.shape[1])
        return tile.scatter_add_(1, column[:, None], (known.grad_logprobs * here)[:, None])


def _columns(targets: torch.Tensor, first: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the target is among these words, and in which column (in some column, where it is not)."""
    column = targets - first
    return (column >= 0) & (column < words), column.clamp(0, words - 1)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, new: bool, last: bool) -> None:
    """total += a @ b, which is not rounded to the narrower dtype of a and b before it is added.

    new: what is in ``total`` is not defined yet. last: it is also the last product; only then is it rounded, once.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if new else 1)
    elif new and last:
        total.copy_(a @ b)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=0 if new else 1, out_dtype=total.dtype, out=total)
    else:  # a CPU has no such product
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if new else 1)
