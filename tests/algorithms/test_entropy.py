"""The entropy-quantile mask: global over ranks, ties, borders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tokens import on_ranks

from rlsys.algorithms.collective import Alone
from rlsys.algorithms.entropy import above_quantile


@given(st.integers(0, 500), st.floats(0, 1))
def test_keeps_the_share_above_the_quantile(seed: int, quantile: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(int(torch.randint(1, 60, (), generator=generator)), generator=generator)
    mask = torch.rand(len(entropy), generator=generator) < 0.7
    keep = above_quantile(entropy, mask, quantile, Alone())
    assert not (keep & ~mask).any()
    if mask.any():
        threshold = torch.quantile(entropy[mask].double(), quantile).float()
        assert torch.equal(keep, mask & (entropy >= threshold))
        assert keep.any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(2, 4), st.floats(0, 1))
def test_any_ranks_keep_the_same_tokens(seed: int, ranks: int, quantile: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(40, generator=generator)
    mask = torch.rand(40, generator=generator) < 0.7
    owner = torch.randint(0, ranks - 1, (40,), generator=generator)  # the last rank holds nothing
    whole = above_quantile(entropy, mask, quantile, Alone())
    parts = on_ranks(ranks, lambda r, c: above_quantile(entropy[owner == r], mask[owner == r], quantile, c))
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[owner == rank])


def test_borders_ties_and_what_lies_off_the_mask() -> None:
    entropy = torch.tensor([1.0, torch.nan, 2.0, 2.0, 3.0])
    mask = torch.tensor([True, False, True, True, True])
    assert above_quantile(entropy, mask, 0.0, Alone()).tolist() == mask.tolist()
    assert above_quantile(entropy, mask, 1.0, Alone()).tolist() == [False, False, False, False, True]
    assert above_quantile(entropy, mask, 0.5, Alone()).tolist() == [False, False, True, True, True]
    assert above_quantile(torch.ones(4), torch.ones(4, dtype=torch.bool), 1.0, Alone()).all()


def test_no_tokens_and_bad_input() -> None:
    assert above_quantile(torch.empty(0), torch.empty(0, dtype=torch.bool), 0.5, Alone()).shape == (0,)
    assert not above_quantile(torch.ones(2), torch.zeros(2, dtype=torch.bool), 0.5, Alone()).any()
    with pytest.raises(ValueError, match=r"1\.5"):
        above_quantile(torch.ones(2), torch.ones(2, dtype=torch.bool), 1.5, Alone())
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        above_quantile(torch.ones(2), torch.ones(1, dtype=torch.bool), 0.5, Alone())


def test_more_tokens_than_torch_quantile_takes() -> None:
    entropy = torch.arange(2**24 + 2, dtype=torch.float32)
    mask = torch.ones(len(entropy), dtype=torch.bool)
    assert int(above_quantile(entropy, mask, 0.75, Alone()).sum()) == pytest.approx(2**22, abs=2)
