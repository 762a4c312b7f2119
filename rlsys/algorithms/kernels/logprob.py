"""One pass over a tile of logits [n, w]: what log-prob and entropy need of it, or the gradient in its place.

The products that make a tile and use its gradient are the vendor's, which nothing here would beat. Reading a tile once
costs little beside them. Statistics are float32 whatever the tile's dtype.
"""

# Kernels have Triton's own types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsys.algorithms.kernels.tiles import Known, Running

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _fold_kernel(
    tile,
    stride,
    targets,
    top,
    total,
    weighted,
    target_logit,
    first,
    words,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(top + row)
    s = tl.load(total + row)
    x = tl.load(weighted + row)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        inside = word < words
        z = tl.load(tile + row * stride + word, mask=inside, other=-float("inf")).to(tl.float32) / temperature
        new = tl.maximum(m, tl.max(z, axis=0))
        moved = m - new
        scale = tl.exp(moved)
        z = z - new
        e = tl.exp(z)
        x = scale * (x + s * moved) + tl.sum(tl.where(inside, e * z, 0.0), axis=0)
        s = scale * s + tl.sum(e, axis=0)
        m = new
    tl.store(top + row, m)
    tl.store(total + row, s)
    tl.store(weighted + row, x)
    column = tl.load(targets + row) - first
    if (column >= 0) & (column < words):
        tl.store(target_logit + row, tl.load(tile + row * stride + column).to(tl.float32) / temperature)


@triton.jit
def _gradient_kernel(
    tile,
    stride,
    targets,
    log_z,
    entropy,
    grad_logprob,
    grad_entropy,
    first,
    words,
    temperature,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < words
    place = tile + row * stride + word
    log_p = tl.load(place, mask=inside, other=0.0).to(tl.float32) / temperature - tl.load(log_z + row)
    p = tl.exp(log_p)
    g = tl.load(grad_logprob + row)
    column = tl.load(targets + row) - first
    grad = tl.where(word == column, g, 0.0) - g * p
    if ENTROPY:
        grad -= tl.load(grad_entropy + row) * p * (log_p + tl.load(entropy + row))
    tl.store(place, grad.to(tile.dtype.element_ty), mask=inside)


def fold(tile: torch.Tensor, targets: torch.Tensor, first: int, temperature: float, running: Running) -> None:
    """``Workspace.fold``. tile: [n, w], any stride between rows; targets: [n] int64."""
    rows, words = tile.shape
    _fold_kernel[(rows,)](
        tile,
        tile.stride(0),
        targets,
        running.top,
        running.total,
        running.weighted,
        running.target,
        first,
        words,
        temperature,
        BLOCK=_block(words),
        num_warps=_WARPS,
    )


def gradient(tile: torch.Tensor, targets: torch.Tensor, first: int, temperature: float, known: Known) -> None:
    """``Workspace.gradient``."""
    rows, words = tile.shape
    block = _block(words)
    _gradient_kernel[(rows, triton.cdiv(words, block))](
        tile,
        tile.stride(0),
        targets,
        known.log_z,
        known.entropy,
        known.grad_logprobs,
        known.grad_logprobs if known.grad_entropy is None else known.grad_entropy,
        first,
        words,
        temperature,
        ENTROPY=known.grad_entropy is not None,
        BLOCK=block,
        num_warps=_WARPS,
    )


def _block(words: int) -> int:
    """Words that a program holds at once."""
    return min(_BLOCK, triton.next_power_of_2(words))
