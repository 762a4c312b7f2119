"""How long responses are, and how many of them a sampler decodes at each moment."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


def response_lengths(count: int, mean: float, limit: int) -> list[int]:
    """Quantiles of lengths whose chance to end is the same at every token, cut at ``limit``: a long tail with this
    mean. A mean of ``limit`` or more: all are as long.

    Args:
        count: how many. mean: 1 … of the lengths, after they were cut.
    """
    if mean >= limit:
        return [limit] * count
    low, high = 1e-9, 1.0
    for _ in range(80):
        stop = math.sqrt(low * high)
        if (1 - (1 - stop) ** limit) / stop > mean:
            low = stop
        else:
            high = stop
    if high >= 1.0 - 1e-9:
        return [1] * count
    ends = math.log1p(-high)
    quantiles = ((i + 0.5) / count for i in range(count))
    return [min(limit, max(1, math.ceil(math.log1p(-u) / ends))) for u in quantiles]


@dataclass(frozen=True)
class Stretch:
    """Decoding steps with the same rows. context: tokens that all rows together have behind them, on average."""

    steps: int
    rows: int
    context: float


def decoding(lengths: Sequence[int], slots: int, prompt: float) -> list[Stretch]:
    """What a sampler does with responses of these lengths of which it decodes ``slots`` at once; one that ends makes
    room for the next.

    Args:
        lengths: in any order; they are taken in a fixed shuffled one, as it is not known which will be long.
        prompt: tokens in front of each.
    """
    waiting = _shuffled(lengths)[::-1]
    under_way: list[tuple[int, int]] = []  # (step at which it ends, step at which it began)
    begun, now, result = 0, 0, []  # Σ of the steps at which the rows under way began
    while waiting or under_way:
        while waiting and len(under_way) < slots:
            heapq.heappush(under_way, (now + waiting.pop(), now))
            begun += now
        end = under_way[0][0]
        rows = len(under_way)
        middle = (now + end) / 2
        result.append(Stretch(end - now, rows, rows * (prompt + middle) - begun))
        now = end
        while under_way and under_way[0][0] == now:
            begun -= heapq.heappop(under_way)[1]
    return result


def _shuffled(lengths: Sequence[int]) -> list[int]:
    """Every one once, at a stride that is coprime to their number and near its golden section."""
    count = len(lengths)
    stride = max(1, round(count * 0.618))
    while math.gcd(stride, count) != 1:
        stride += 1
    return [lengths[i * stride % count] for i in range(count)]
