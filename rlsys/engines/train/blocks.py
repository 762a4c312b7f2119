"""Flex attention's block mask of a packed row, from where its sequences begin and end: no [T, T] mask is made.

A query block is cut where sequences end. All queries of such a piece are neighbours in one sequence, so what they see
together, and what every one of them sees, are runs of keys: of the context, and of their own sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

BLOCK = 128


def block_mask(
    lengths: Sequence[int], position_ids: torch.Tensor, contexts: Sequence[int] | None, window: int | None
) -> Any:
    """The BlockMask of a row, as ``create_block_mask`` makes it.

    Args:
        lengths, position_ids, contexts: as Packing has them.
        window: so many tokens does a query see, itself among them; None: all before it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, total = position_ids.device, sum(lengths)
    places = position_ids[0]
    sizes = torch.tensor(lengths, device=device)
    own = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    context = torch.full_like(own, -1) if contexts is None else torch.tensor(contexts, device=device)[own]

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        allowed = ((own[query] == own[key]) & (query >= key)) | (context[query] == own[key])
        return allowed if window is None else allowed & (places[query] - places[key] < window)

    begins = sizes.cumsum(0).cpu() - sizes.cpu()
    first = places.cpu()[begins]
    partial, full = blocks(sizes.cpu(), first, None if contexts is None else torch.tensor(contexts), window)
    return BlockMask.from_kv_blocks(
        *_ordered(partial, device), *_ordered(full, device), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(total, total)
    )


def blocks(
    lengths: torch.Tensor, first: torch.Tensor, contexts: torch.Tensor | None, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key blocks some but not all queries of a block see some but not all of, and which they all see as a whole.

    Args:
        lengths: [n] tokens of each segment. first: [n] the position of its first token.
        contexts: [n] the segment that it sees in front of its own tokens, −1: none; None: no segment has one.
        window: see :func:`block_mask`.

    Returns:
        [blocks, blocks] bool, query blocks by key blocks, twice.
    """
    ends = lengths.cumsum(0)
    starts, total = ends - lengths, int(ends[-1])
    count = -(-total // BLOCK)
    cuts = torch.unique(torch.cat([starts, torch.arange(0, total, BLOCK)]))
    until = torch.cat([cuts[1:], ends[-1:]])  # each piece is [cuts, until)
    segment = torch.searchsorted(ends, cuts, right=True)
    row = cuts // BLOCK
    some, every = [_own(cuts, until, starts[segment], window)], [_own(until - 1, cuts + 1, starts[segment], window)]
    if contexts is not None:
        behind = contexts[segment]
        offset = first[segment] - starts[segment] - first[behind] + starts[behind]  # from a query to keys in front
        there = behind >= 0
        for runs, query in ((some, cuts), (every, until - 1)):
            low = starts[behind] if window is None else torch.maximum(starts[behind], query + offset - window + 1)
            runs.append((low, torch.where(there, ends[behind], 0)))
        every = _joined(*every)
    seen = sum(_marked(row, low // BLOCK, -(-high // BLOCK), low < high, count) for low, high in some)
    covered = sum(_marked(row, -(-low // BLOCK), high // BLOCK, low < high, count) for low, high in every)
    pieces = torch.zeros(count, dtype=torch.int32).index_add(0, row, torch.ones_like(row, dtype=torch.int32))
    if total % BLOCK:
        pieces[-1] = -1  # a block that the row does not fill is not seen as a whole
    full = covered == pieces[:, None]
    return (seen > 0) & ~full, full


Run = tuple[torch.Tensor, torch.Tensor]  # [pieces] of keys: from, until


def _own(query: torch.Tensor, until: torch.Tensor, start: torch.Tensor, window: int | None) -> Run:
    """Keys of a segment that begins at ``start``, from the first one that ``query`` sees."""
    return (start if window is None else torch.maximum(start, query - window + 1)), until


def _joined(one: Run, other: Run) -> list[Run]:
    """The same keys: where one run goes on in the other, both are one, and the other is empty."""
    (a, b), (c, d) = one, other
    live = (a < b) & (c < d)
    after, before = live & (b == c), live & (d == a)
    low, high = torch.where(before, c, a), torch.where(after, d, b)
    return [(low, high), (c, torch.where(after | before, c, d))]


def _marked(row: torch.Tensor, low: torch.Tensor, high: torch.Tensor, live: torch.Tensor, count: int) -> torch.Tensor:
    """[count, count] how many runs of blocks [low, high) of a row have a block."""
    kept = live & (low < high)
    steps = torch.zeros(count, count + 1, dtype=torch.int32)
    one = torch.ones(int(kept.sum()), dtype=torch.int32)
    steps.index_put_((row[kept], low[kept]), one, accumulate=True)
    steps.index_put_((row[kept], high[kept]), -one, accumulate=True)
    return steps.cumsum(1, dtype=torch.int32)[:, :count]


def _ordered(bits: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, 1, blocks] how many bits each row has, and [1, 1, blocks, blocks] their columns, in front."""
    columns = bits.int().argsort(dim=1, descending=True, stable=True)
    return bits.sum(1, dtype=torch.int32)[None, None].to(device), columns.int()[None, None].to(device)
