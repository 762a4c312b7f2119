"""Sampling whose noise depends on nothing but (seed, position, token): a row's sample is its own in any batch."""

from __future__ import annotations

from functools import cache

import torch

# The noise of so many (row, token) pairs is made at once: on a CPU it then stays in the cache; other devices are kept
# busy.
_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ELSEWHERE = 1 << 27


def sample_tokens(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    greedy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, drawn from softmax(logits / temperature).

    The token is argmax p / E with E ~ Exp(1): the Gumbel-max trick, argmax log p − log E, without its logarithms.

    Args:
        logits: [B, V] float32; not kept.
        temperatures: [B] float32, positive.
        seeds: [B] int64, one a sequence.
        positions: [B] int64, index of the token to be sampled within the sequence's response.
        greedy: [B] bool, rows that take the likeliest token instead; None: none do.

    Returns:
        Tokens [B] int64, and the log-probability [B] float32 of each at the temperature.
    """
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty_like(temperatures)
    rows = max(1, _ELEMENTS.get(logits.device.type, _ELEMENTS_ELSEWHERE) // logits.shape[-1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        p = (logits[part] / temperatures[part, None]).softmax(-1)
        race = exponential_noise(seeds[part], positions[part], logits.shape[-1])
        picked = torch.div(p, race, out=race).argmax(-1)
        if greedy is not None:
            picked = torch.where(greedy[part], logits[part].argmax(-1), picked)
        tokens[part] = picked
        logprobs[part] = p.gather(-1, picked[:, None])[:, 0].log()
    return tokens, logprobs


def exponential_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard exponential noise; small values, which decide a race, are the exact ones.

    Args:
        seeds: [B] int64. positions: [B] int64. vocabulary: V.

    Returns:
        [B, V] float32, positive; one in 2²⁵ is infinite.
    """
    low, high = _mix(seeds + _mix(positions + 1)).view(torch.int32).view(-1, 2, 1).unbind(1)
    bits = _tokens(vocabulary, seeds.device) + low
    # A 32-bit multiply-xorshift finaliser ("lowbias32", C. Wellons), keyed a second time half-way.
    spare = torch.empty_like(bits)
    _xorshift(bits, 16, spare).mul_(0x7FEB352D)
    _xorshift(bits, 15, spare).bitwise_xor_(high).mul_(_signed32(0x846CA68B))
    _xorshift(bits, 16, spare).bitwise_and_(0x7FFFFFFF)
    return bits.to(torch.float32).add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()


@cache
def _tokens(vocabulary: int, device: torch.device) -> torch.Tensor:
    """[V] int32, a number for each token."""
    steps = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=device) * 0x9E3779B9
    return steps.view(torch.int32)[::2].clone()


def _xorshift(bits: torch.Tensor, by: int, spare: torch.Tensor) -> torch.Tensor:
    """bits ^= bits >> by, logically: torch's own shift copies the sign."""
    torch.bitwise_right_shift(bits, by, out=spare).bitwise_and_((1 << (32 - by)) - 1)
    return bits.bitwise_xor_(spare)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, elementwise on int64 (arithmetic wraps, which is what it wants)."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
