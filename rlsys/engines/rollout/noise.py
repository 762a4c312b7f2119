"""Sampling noise that depends on nothing but (seed, position, token): a row's sample is its own in any batch."""

from __future__ import annotations

import torch


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise; argmax(logits / T + noise) is a sample of softmax(logits / T) (the Gumbel-max trick).

    Args:
        seeds: [B] int64, one a sequence.
        positions: [B] int64, index of the token to be sampled within the sequence's response.
        vocabulary: V.

    Returns:
        [B, V] float32.
    """
    stream = _mix(seeds + _mix(positions + 1))
    tokens = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=seeds.device) * _GOLDEN
    bits = _mix(stream[:, None] + tokens[None, :])
    uniform = ((bits >> 11) & _MASK_53).to(torch.float64).add_(0.5).mul_(2.0**-53)  # in (0, 1), never at an end
    return uniform.log_().neg_().log_().neg_().float()


_MASK_53 = (1 << 53) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, elementwise on int64 (arithmetic wraps, which is what it wants)."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
