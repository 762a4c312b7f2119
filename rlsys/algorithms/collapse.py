"""Signs that outputs have become all the same: how far values are spread, and how much of a response repeats itself.

What they are compared with, and when that is an alarm: ``rlsys/tracking/collapse.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HELD = 2**20  # distances held at a time


class Spread(NamedTuple):
    """variance: population variance (over n), mean over dimensions, in squared units of the values; pairwise_distance:
    mean Euclidean distance over all n(n−1)/2 unordered pairs, in units of the values."""

    variance: float
    pairwise_distance: float


def spread(values: Tensor) -> Spread:
    """How far points are from one another, computed in float64.

    Args:
        values: [n] (O(n log n), by sorting) or [n, d] (O(n²·d), by blocks of rows: 2^20 distances are held, or one
            row's).

    Returns:
        Zeros for fewer than two points; NaN where a value is not finite.

    Raises:
        ValueError: another number of dimensions.
    """
    if values.ndim not in (1, 2):
        raise ValueError(f"points are [n] or [n, d], not {list(values.shape)}")
    if len(values) < 2 or values.numel() == 0:
        return Spread(0.0, 0.0)
    points = values.detach().double()
    points = points - points.mean(0)  # neither figure sees a shift, and differences of small numbers are exact
    total = _line(points) if points.ndim == 1 else _space(points)
    pairs = len(points) * (len(points) - 1) / 2
    return Spread(float(points.var(0, correction=0).mean()), total / pairs)


def _line(points: Tensor) -> float:
    """Σ|xᵢ − xⱼ| over pairs of [n]: the gap between two neighbours in order is crossed by every pair around it."""
    gaps = points.sort().values.diff()
    left = torch.arange(1, len(points), dtype=torch.float64, device=points.device)
    return float((gaps * left * (len(points) - left)).sum())


def _space(points: Tensor) -> float:
    """Σ‖xᵢ − xⱼ‖ over pairs of [n, d]."""
    total, size = 0.0, max(1, _HELD // len(points))
    for start in range(0, len(points), size):
        block, onward = points[start : start + size], points[start:]
        distance = torch.cdist(block, onward, compute_mode="donot_use_mm_for_euclid_dist")  # exact for near points
        inside = distance[:, : len(block)]  # holds each of the block's own pairs twice
        total += float(distance.sum() - inside.sum() / 2)
    return total


def repetition(ids: Tensor, lengths: Tensor, n: int = 4) -> Tensor:
    """The share of a response's n-grams that occurred before in the same response: 1 − distinct / all (seq-rep-n of
    arXiv 1908.04319).

    Exact (n-grams are numbered, not hashed), O(n·M log M), one process.

    Args:
        ids: [M] integers, tokens of all responses end to end.
        lengths: [B] tokens of each response.
        n: tokens of an n-gram, at least 1.

    Returns:
        [B] float32 in [0, 1); 0 where a response is shorter than n + 1.

    Raises:
        ValueError: n is below 1, or lengths do not add up to the tokens.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one token, not {n}")
    lengths = lengths.to(ids.device)
    if ids.ndim != 1 or lengths.ndim != 1 or int(lengths.sum()) != len(ids):
        raise ValueError(f"lengths {list(lengths.shape)} add up to {int(lengths.sum())}, ids are {list(ids.shape)}")
    count = len(lengths)
    rows = torch.arange(count, device=ids.device).repeat_interleave(lengths)
    if len(ids) < n:
        return torch.zeros(count, device=ids.device)
    tokens = torch.unique(ids, return_inverse=True)[1]  # below M, so that a pair of numbers fits into int64
    grams, base = rows, len(ids) + 1  # grams[i]: the number of row and first k tokens at place i
    for k in range(n):
        here = grams[: len(ids) - k] * base + tokens[k:]
        grams = torch.unique(here, return_inverse=True)[1]
    inside = rows[: len(grams)] == rows[n - 1 :]  # n-grams that do not cross into the next response
    rows, grams = rows[: len(grams)][inside], grams[inside]
    total = torch.bincount(rows, minlength=count)
    owner = torch.full((len(ids),), -1, dtype=torch.int64, device=ids.device).scatter_(0, grams, rows)
    distinct = torch.bincount(owner[owner >= 0], minlength=count)
    return ((total - distinct) / total.clamp(min=1)).float()
