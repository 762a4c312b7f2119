"""The clipped surrogate against verl's, its exact zeros, and its metrics as sums and counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.losses import POLICY_LOSSES
from rlsys.algorithms.losses.ppo_clip import ppo_clip
from rlsys.config.errors import UserError


def random_tokens(seed: int, shape: tuple[int, ...] = (6, 9)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator) * 3
    lengths = torch.randint(1, shape[-1] + 1, (shape[0], 1), generator=generator)
    return {
        "logprobs": (old + 0.4 * torch.randn(shape, generator=generator)).requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.randn(shape, generator=generator),
        "mask": torch.arange(shape[-1]) < lengths,
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bounds", [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.3, 1.5), (0.2, 0.2, 3.0)])
def test_matches_verl(bounds: tuple[float, float, float | None], seed: int) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    actor = pytest.importorskip("verl.workers.config.actor")
    low, high, dual = bounds
    config = actor.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual or 1e9,
    )
    tokens = random_tokens(seed)
    theirs, their_metrics = core_algos.compute_policy_loss_vanilla(
        tokens["old_logprobs"], tokens["logprobs"], tokens["advantages"], tokens["mask"].float(), "token-mean", config
    )
    (their_gradient,) = torch.autograd.grad(theirs, tokens["logprobs"])
    ours = ppo_clip(**tokens, clip_low=low, clip_high=high, dual_clip=dual)
    loss = ours.tokens.sum() / tokens["mask"].sum()
    (gradient,) = torch.autograd.grad(loss, tokens["logprobs"])
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-8)
    value, count = ours.sums["clip_fraction"]
    assert (value / count).item() == pytest.approx(their_metrics["actor/pg_clipfrac"])
    if dual is not None:
        value, count = ours.sums["dual_clip_fraction"]
        assert (value / count).item() == pytest.approx(their_metrics["actor/pg_clipfrac_lower"])


@given(st.floats(-2, 2), st.floats(-2, 2).filter(lambda a: a == 0 or abs(a) > 1e-3), st.booleans())
def test_gradient_is_exactly_zero_where_clipped_or_masked(log_ratio: float, advantage: float, masked: bool) -> None:
    logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    result = ppo_clip(logprobs, torch.zeros_like(advantages), advantages, torch.tensor([not masked]))
    result.tokens.sum().backward()
    ratio = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
    clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    expected = 0.0 if clipped or masked else -ratio * advantage
    assert logprobs.grad is not None
    assert logprobs.grad.item() == (0.0 if expected == 0 else pytest.approx(expected))
    assert result.sums["clip_fraction"][0].item() == int(clipped and not masked)


def test_what_lies_off_the_mask_cannot_hurt() -> None:
    logprobs = torch.tensor([-1.0, -torch.inf, -2.0], requires_grad=True)
    old = torch.tensor([-1.5, 0.0, torch.nan])
    advantages = torch.tensor([1.0, torch.inf, torch.nan])
    result = ppo_clip(logprobs, old, advantages, torch.tensor([True, False, False]))
    result.tokens.sum().backward()
    assert torch.isfinite(result.tokens).all()
    assert logprobs.grad is not None
    assert logprobs.grad[1:].tolist() == [0.0, 0.0]
    assert result.maxima["ratio_max"].item() == pytest.approx(1.6487, abs=1e-4)
    assert [float(v) for v in result.sums["ratio"]] == [pytest.approx(1.6487, abs=1e-4), 1.0]


def test_the_first_step_has_the_plain_policy_gradient() -> None:
    tokens = random_tokens(7)
    tokens["old_logprobs"] = tokens["logprobs"].detach()
    result = ppo_clip(**tokens)
    (gradient,) = torch.autograd.grad(result.tokens.sum(), tokens["logprobs"])
    torch.testing.assert_close(gradient, torch.where(tokens["mask"], -tokens["advantages"], 0.0))
    assert result.sums["clip_fraction"][0] == 0
    assert result.sums["approx_kl"][0] == 0


def test_metrics_add_up_over_any_cut() -> None:
    tokens = {name: value.detach().flatten() for name, value in random_tokens(3).items()}
    whole = ppo_clip(**tokens, dual_clip=2.0)
    parts = [ppo_clip(**{n: v[s] for n, v in tokens.items()}, dual_clip=2.0) for s in (slice(0, 11), slice(11, None))]
    for name, pair in whole.sums.items():
        for i in (0, 1):
            torch.testing.assert_close(pair[i], sum(part.sums[name][i] for part in parts))
    assert whole.maxima["ratio_max"] == max(part.maxima["ratio_max"] for part in parts)


def test_no_tokens_and_bad_options() -> None:
    empty = torch.empty(0)
    result = ppo_clip(empty, empty, empty, torch.empty(0, dtype=torch.bool), dual_clip=3.0)
    assert result.tokens.shape == (0,)
    assert set(result.sums) == {"clip_fraction", "approx_kl", "ratio", "dual_clip_fraction"}
    with pytest.raises(UserError, match="more than 1"):
        ppo_clip(empty, empty, empty, torch.empty(0, dtype=torch.bool), dual_clip=0.5)
    assert "ppo_clip" in POLICY_LOSSES.names()
