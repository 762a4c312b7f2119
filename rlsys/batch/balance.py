"""Who gets which rows: prompt groups over ranks, and rows over micro-batches. Pure functions of lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from rlsys.config.errors import UserError


def balanced_partitions(group_tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Distributes whole prompt groups so that every part has nearly as many tokens.

    The largest differencing method (Karmarkar and Karp 1982) in its form for several parts: the two partial divisions
    that are the least even are laid over each other, the fullest part of one on the emptiest of the other, until one is
    left. Parts then differ by no more than the largest group. The same input gives the same parts.

    Args:
        group_tokens: tokens of each group.
        parts: how many parts; there may be fewer groups, and then some parts are empty.

    Returns:
        ``parts`` lists of group indices, ascending.

    Raises:
        ValueError: ``parts`` is not positive.
    """
    if parts < 1:
        raise ValueError(f"groups cannot be distributed over {parts} parts")
    # a division: how uneven, then [(tokens, groups)] with the fullest part first; the index breaks ties
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for group, tokens in enumerate(group_tokens):
        heap.append((-int(tokens), group, [(int(tokens), [group]), *((0, []) for _ in range(parts - 1))]))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, first_index, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [(a + b, left + right) for (a, left), (b, right) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], first_index, merged))
    return [sorted(groups) for _, groups in heap[0][2]] if heap else [[] for _ in range(parts)]


def micro_batches(lengths: Sequence[int], token_budget: int, sequences: Sequence[int] | None = None) -> list[list[int]]:
    """Cuts rows into the fewest micro-batches of at most ``token_budget`` tokens, padding included, and pads as little
    as so many allow.

    Rows of similar length come together: in order of length the best micro-batches are runs of neighbours, and where
    to cut is found by dynamic programming over the rows.

    Args:
        lengths: tokens of each row, of its longest sequence where it has several.
        token_budget: most sequences × longest sequence of a micro-batch.
        sequences: how many sequences each row has, which stay together; None: one each.

    Returns:
        Lists of row indices, ascending. The micro-batch with the longest row is first: a lack of memory shows at once.

    Raises:
        UserError: a row is longer than the budget.
    """
    if not len(lengths):
        return []
    sizes = np.asarray(lengths, dtype=np.int64)
    counts = np.ones_like(sizes) if sequences is None else np.maximum(np.asarray(sequences, dtype=np.int64), 1)
    largest = int((sizes * counts).argmax())
    if (need := int(sizes[largest] * counts[largest])) > token_budget:
        several = f" in {counts[largest]} sequences, padding included" if counts[largest] > 1 else ""
        raise UserError(
            f"row {largest} has {need} tokens{several}, a micro-batch may have {token_budget}",
            where="trainer.micro_batch_tokens",
            fix=f"set trainer.micro_batch_tokens={need} or more",
        )
    order = np.argsort(-sizes, kind="stable")
    padded = np.maximum(sizes[order], 1)  # what a sequence costs in a micro-batch of which it is the longest
    before = np.concatenate([[0], np.cumsum(counts[order])])  # sequences of the rows before each
    reach = np.searchsorted(before, before[:-1] + token_budget // padded, side="right") - 1
    starts = _best_starts(padded, before, reach)
    batches, stop = [], len(sizes)
    while stop:
        batches.append(sorted(order[starts[stop] : stop].tolist()))
        stop = int(starts[stop])
    return batches[::-1]


def packed_batches(tokens: Sequence[int], token_budget: int, parts: int | None = None) -> list[list[int]]:
    """Cuts rows that are laid end to end into micro-batches of at most ``token_budget`` tokens and nearly equal size.

    The longest rows first, each to the micro-batch with the fewest tokens (Graham 1969): the fullest exceeds the mean
    by less than its last row, which bounds what ranks wait for each other. Until they fit, one more is tried.

    Args:
        tokens: of each row, all its sequences together.
        token_budget: most tokens of a micro-batch.
        parts: fewest micro-batches; None: as few as fit. There may be fewer rows, and then fewer micro-batches.

    Returns:
        Lists of row indices, ascending; the fullest micro-batch is first: a lack of memory shows at once.

    Raises:
        UserError: a row has more tokens than the budget.
    """
    if not len(tokens):
        return []
    largest = max(range(len(tokens)), key=tokens.__getitem__)
    if tokens[largest] > token_budget:
        raise UserError(
            f"row {largest} has {tokens[largest]} tokens, a micro-batch may have {token_budget}",
            where="trainer.micro_batch_tokens",
            fix=f"set trainer.micro_batch_tokens={tokens[largest]} or more",
        )
    order = sorted(range(len(tokens)), key=lambda row: -tokens[row])
    count = max(-(-sum(tokens) // token_budget), parts or 1, 1)
    while True:
        heap = [(0, part) for part in range(count)]
        batches: list[list[int]] = [[] for _ in range(count)]
        for row in order:
            size, part = heap[0]
            heapq.heapreplace(heap, (size + tokens[row], part))
            batches[part].append(row)
        if max(size for size, _ in heap) <= token_budget:
            sizes = {part: size for size, part in heap}
            filled = sorted((part for part in range(count) if batches[part]), key=lambda part: -sizes[part])
            return [sorted(batches[part]) for part in filled]
        count += 1


def _best_starts(padded: np.ndarray, before: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """[n + 1] where the last micro-batch of the best cut of the first i rows starts.

    Args:
        padded: [n] lengths, descending.
        before: [n + 1] sequences of all rows before each.
        reach: [n] where a micro-batch that starts with row i ends at the latest; ascending.
    """
    count = len(padded)
    # Fewest micro-batches first, then fewest padded tokens: one number, as no cut pads to more than ``heavy`` tokens.
    heavy = int(padded[0]) * int(before[-1]) + 1
    cost = np.zeros(count + 1, dtype=np.int64)
    starts = np.zeros(count + 1, dtype=np.int64)
    first = np.searchsorted(reach, np.arange(count + 1))  # the first row that a micro-batch up to i may start with
    for stop in range(1, count + 1):
        begin = np.arange(first[stop], stop)
        options = cost[begin] + (before[stop] - before[begin]) * padded[begin]
        best = int(options.argmin())
        starts[stop], cost[stop] = begin[best], options[best] + heavy
    return starts


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Which part of the micro-batches' tokens is padding, 0 … 1."""
    computed = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches if len(rows))
    return 1 - sum(lengths[row] for rows in batches for row in rows) / computed if computed else 0.0
