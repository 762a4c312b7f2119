"""Flex attention's block masks, from the borders of sequences, are those that torch makes of all pairs of tokens."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rlsys.engines.train.blocks import BLOCK, block_mask


def packed(seed: int, window: int | None) -> tuple[list[int], torch.Tensor, list[int] | None, int | None]:
    """Sequences of very different lengths in any order, some of which share a context that lies before or behind."""
    draw = random.Random(seed)
    lengths = [draw.choice([1, 3, 40, 128, 200, 256, draw.randint(1, 500)]) for _ in range(draw.randint(1, 9))]
    contexts = None
    if len(lengths) > 2 and seed % 3:
        shared = draw.sample(range(len(lengths)), draw.randint(1, 2))
        contexts = [-1 if own in shared else draw.choice([-1, *shared, *shared]) for own in range(len(lengths))]
    front = [0 if c < 0 else lengths[c] for c in contexts or [-1] * len(lengths)]
    places = torch.cat([torch.arange(skip, skip + n) for skip, n in zip(front, lengths, strict=True)])
    return lengths, places[None], contexts, window


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300])
def test_blocks_are_those_of_all_pairs(window: int | None) -> None:
    filled = 0
    for seed in range(16):
        lengths, places, contexts, _ = packed(seed, window)
        if seed == 0:
            lengths, places = [4 * BLOCK], torch.arange(4 * BLOCK)[None]
        found, total = block_mask(lengths, places, contexts, window), sum(lengths)
        expected = create_block_mask(found.mask_mod, None, None, total, total, device="cpu")
        assert found.seq_lengths == expected.seq_lengths
        assert torch.equal(found.to_dense(), expected.to_dense()), seed
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, columns = getattr(found, f"{name}_num_blocks"), getattr(found, f"{name}_indices")
            assert torch.equal(counts, getattr(expected, f"{name}_num_blocks")), (seed, name)
            ahead = torch.arange(columns.shape[-1]) < counts[..., None]
            assert torch.equal(columns[ahead], getattr(expected, f"{name}_indices")[ahead]), (seed, name)
        filled += int(found.full_kv_num_blocks.sum())
    assert filled or window not in (None, 300)
