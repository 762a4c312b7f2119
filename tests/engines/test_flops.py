"""Model FLOPs by formula, against what torch counts of a real forward and backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

from rlsys.engines.flops import ModelFlops, matmul_peak

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True), Qwen3ForCausalLM),
        (LlamaConfig(**SMALL, tie_word_embeddings=False), LlamaForCausalLM),
    ],
)
def test_forward_and_backward_are_what_torch_counts(config, cls):
    config._attn_implementation = "eager"
    model, length = cls(config), 24
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(1, length, dtype=torch.int64)).logits.sum().backward()
    flops = ModelFlops.of(config, sum(p.numel() for p in model.parameters()))
    # Eager attention computes all pairs, the formula counts the causal half.
    pairs = length**2 - length * (length + 1) / 2
    everything = flops.training(torch.tensor([length]), length) + 3 * 4 * flops.attention * 3 * pairs
    assert everything == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_sequences_add_up_and_only_scored_tokens_go_through_the_head():
    flops = ModelFlops(weights=1000, head=500, attention=8, windows=((None, 2),))
    apart = flops.training(torch.tensor([3]), 1) + flops.training(torch.tensor([7]), 2)
    assert flops.training(torch.tensor([3, 7]), 3) == apart
    assert apart == 3 * (2 * 1000 * 10 + 2 * 500 * 3 + 4 * 8 * 2 * (6 + 28))


def test_a_window_bounds_what_a_token_sees():
    flops = ModelFlops(weights=0, head=0, attention=1, windows=((4, 1),))
    assert flops.training(torch.tensor([6]), 0) == 3 * 4 * (1 + 2 + 3 + 4 + 4 + 4)


def test_experts_count_where_a_token_goes_through_them():
    config = Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    every = ModelFlops.of(config, 1_000_000).weights
    config.num_experts_per_tok = 8
    assert ModelFlops.of(config, 1_000_000).weights - every == 3 * 6 * 3 * 32 * 16


def test_a_value_head_is_one_number_a_token():
    config = Qwen3Config(**SMALL, tie_word_embeddings=False)
    assert ModelFlops.of(config, 100_000, value_head=True).head == 32
    assert ModelFlops.of(config, 100_000, value_head=True).weights == 100_000 - 96 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peak_is_measured(dtype):
    assert matmul_peak(dtype, seconds=0.0) > 1e8


@pytest.mark.parametrize("window", [None, 4])
def test_a_response_behind_a_shared_prompt_sees_it_and_does_not_count_it_again(window):
    """Prompt and response of one row make the same pairs, whether they are one sequence or two."""
    flops = ModelFlops(weights=10, head=5, attention=8, windows=((window, 2),))
    shared = flops.training(torch.tensor([6, 3, 5]), 8, torch.tensor([0, 6, 6]))
    assert shared == flops.training(torch.tensor([9, 11]), 8) - flops.training(torch.tensor([6]), 0)
