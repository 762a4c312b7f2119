"""What each policy loss does that the others do not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_tokens import random_rows

from rlsys.algorithms.collective import Alone
from rlsys.algorithms.losses import PolicyLoss, clip_cov, kl_cov
from rlsys.algorithms.losses.cispo import cispo
from rlsys.algorithms.losses.dapo import dapo
from rlsys.algorithms.losses.decoupled_ppo import decoupled_ppo
from rlsys.algorithms.losses.dppo_tv import dppo_tv
from rlsys.algorithms.losses.gmpo import gmpo
from rlsys.algorithms.losses.gspo import gspo
from rlsys.algorithms.losses.ppo_clip import ppo_clip
from rlsys.algorithms.losses.sapo import sapo


def one(function: Any, ratio: float, advantage: float, **options: Any) -> tuple[float, float, PolicyLoss]:
    """Loss and gradient of a single token with π_old = ½."""
    old = torch.tensor([0.5], dtype=torch.float64).log()
    logprobs = (old + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    found = function(logprobs, old, advantages, torch.tensor([True]), **options)
    (gradient,) = torch.autograd.grad(found.tokens.sum(), logprobs)
    return found.tokens.item(), gradient.item(), found


def row(log_ratios: list[float], advantage: float) -> dict[str, Any]:
    """One row, with π_old = e^−1 throughout."""
    size = len(log_ratios)
    old = torch.full((size,), -1.0, dtype=torch.float64)
    return {
        "logprobs": (old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.full((size,), advantage, dtype=torch.float64),
        "mask": torch.ones(size, dtype=torch.bool),
        "rows": torch.zeros(size, dtype=torch.int64),
        "num_rows": 1,
    }


def gradient(found: PolicyLoss, batch: dict[str, Any]) -> torch.Tensor:
    return torch.autograd.grad(found.tokens.mean(), batch["logprobs"])[0]


def test_dapo_lets_likelier_tokens_rise_further() -> None:
    assert one(ppo_clip, 1.25, 1.0)[1] == 0.0
    assert one(dapo, 1.25, 1.0)[1] == pytest.approx(-1.25)
    assert one(dapo, 1.29, 1.0)[1] == 0.0
    assert one(dapo, 0.79, -1.0)[1] == 0.0


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=5), st.sampled_from([1.0, -2.0]))
def test_gspo_clips_whole_rows(log_ratios: list[float], advantage: float) -> None:
    batch = row(log_ratios, advantage)
    found = gspo(**batch, clip_low=0.1, clip_high=0.1)
    sequence = math.exp(sum(log_ratios) / len(log_ratios))
    slopes = gradient(found, batch)
    if sequence > 1.1 + 1e-9 if advantage > 0 else sequence < 0.9 - 1e-9:
        assert (slopes == 0).all()
        assert found.sums["clip_fraction"][0] == len(log_ratios)
    elif sequence < 1.1 - 1e-9 if advantage > 0 else sequence > 0.9 + 1e-9:
        assert slopes.tolist() == pytest.approx([-advantage * sequence / len(log_ratios)] * len(log_ratios))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.sampled_from([1.0, -2.0]))
def test_gmpo_clips_tokens_of_the_geometric_mean(log_ratios: list[float], advantage: float) -> None:
    batch = row(log_ratios, advantage)
    found = gmpo(**batch)
    bounded = [min(x, 0.4) if advantage > 0 else max(x, -0.4) for x in log_ratios]
    mean = math.exp(sum(bounded) / len(bounded))
    torch.testing.assert_close(found.tokens, torch.full_like(found.tokens, -advantage * mean))
    far = (batch["logprobs"] - batch["old_logprobs"]).detach().abs().sub(0.4).abs() > 1e-6
    slopes = gradient(found, batch)[far].tolist()
    earned = [slope for slope in slopes if slope != 0]
    assert earned == pytest.approx([-advantage * mean / len(bounded)] * len(earned))
    if far.all():
        beyond = sum(x > 0.4 if advantage > 0 else x < -0.4 for x in log_ratios)
        assert found.sums["clip_fraction"][0] == beyond == slopes.count(0.0)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    assert one(cispo, 3.0, 1.0)[1] == pytest.approx(-1.2)
    assert one(cispo, 0.1, 1.0)[1] == pytest.approx(-0.1)
    assert one(cispo, 0.1, -1.0, clip_low=0.2)[1] == pytest.approx(0.8)
    assert one(cispo, 3.0, 1.0, cap="absolute")[1] == pytest.approx(-3.0)
    assert one(cispo, 9.0, 1.0, cap="absolute")[1] == pytest.approx(-5.0)
    assert one(cispo, 3.0, -1.0, cap="absolute", clip_high=2.0)[1] == pytest.approx(2.0)
    assert one(cispo, 9.0, 1.0)[2].sums["clip_fraction"][0] == 1
    assert one(cispo, 1.1, 1.0)[2].sums["clip_fraction"][0] == 0


@given(st.floats(0.01, 10), st.sampled_from([1.0, -1.0]))
def test_sapo_fades_on_both_sides(ratio: float, advantage: float) -> None:
    slope = one(sapo, ratio, advantage)[1]
    assert abs(slope) <= abs(one(sapo, 1.0, advantage)[1]) * ratio + 1e-12
    tau = 1.0 if advantage > 0 else 1.05
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert slope == pytest.approx(-advantage * ratio * 4 * gate * (1 - gate))
    assert one(sapo, ratio, advantage)[2].sums["gate"][0].item() == pytest.approx(4 * gate * (1 - gate))


@pytest.mark.parametrize(
    ("ratio", "advantage", "dropped"),
    [(1.5, 1.0, "dropped_high"), (1.5, -1.0, None), (0.5, -1.0, "dropped_low"), (0.5, 0.0, "dropped_low"),
     (0.5, 1.0, None), (1.3, 1.0, None), (0.7, -1.0, None)],
)  # fmt: skip
def test_dppo_drops_what_has_moved_far_in_its_direction(ratio: float, advantage: float, dropped: str | None) -> None:
    """π_old = μ = ½: the probability moves by ½(ratio − 1)."""
    sampler = torch.tensor([0.5], dtype=torch.float64).log()
    value, slope, found = one(dppo_tv, ratio, advantage, rollout_logprobs=sampler, kl_tau=0.0)
    assert value == slope == (0.0 if dropped else pytest.approx(-ratio * advantage))
    for name in ("dropped_low", "dropped_high"):
        assert found.sums[name][0] == (name == dropped)
    value, slope, _ = one(dppo_tv, ratio, advantage, rollout_logprobs=sampler, kl_tau=0.1)
    policy = 0.0 if dropped else -ratio * advantage
    assert value == pytest.approx(policy + 0.1 * math.log(ratio) ** 2)
    assert slope == pytest.approx(policy + 0.2 * math.log(ratio))


def test_dppo_cap_bounds_the_weight_and_keeps_the_gradient() -> None:
    sampler = torch.tensor([0.01], dtype=torch.float64).log()
    options = {"rollout_logprobs": sampler, "kl_tau": 0.0, "mask_low": 1.0, "mask_high": 1.0}
    assert one(dppo_tv, 1.0, 1.0, **options)[1] == pytest.approx(-50.0)
    assert one(dppo_tv, 1.0, 1.0, ratio_cap=4.0, **options)[:2] == (pytest.approx(-4.0), pytest.approx(-4.0))
    assert one(dppo_tv, 1.0, 1.0, adv_tau=0.5, **options)[1] == pytest.approx(-25.0)


def test_decoupled_weights_and_drops() -> None:
    near, far = (torch.tensor([p], dtype=torch.float64).log() for p in (0.25, 0.05))
    assert one(decoupled_ppo, 1.1, 1.0, rollout_logprobs=near)[1] == pytest.approx(-2 * 1.1)
    assert one(decoupled_ppo, 1.3, 1.0, rollout_logprobs=near)[:2] == (pytest.approx(-2 * 1.2), 0.0)
    value, slope, found = one(decoupled_ppo, 1.1, 1.0, rollout_logprobs=far)
    assert (value, slope) == (0.0, 0.0)
    assert [int(x) for x in found.sums["weight_over_cap"]] == [1, 1]
    assert one(decoupled_ppo, 1.1, 1.0, rollout_logprobs=far, clamp=True)[1] == pytest.approx(-5 * 1.1)
    assert one(decoupled_ppo, 1.1, 1.0, rollout_logprobs=far, weight_cap=20.0)[1] == pytest.approx(-10 * 1.1)


def covariance(batch: dict[str, Any]) -> torch.Tensor:
    mask = batch["mask"]
    gains, logs = batch["advantages"], batch["old_logprobs"]
    return (gains - gains[mask].mean()) * (logs - logs[mask].mean())


@given(st.integers(0, 200), st.floats(0.01, 1.0))
def test_kl_cov_holds_the_highest_covariances(seed: int, ratio: float) -> None:
    batch = random_rows(seed)
    args = [batch[name] for name in ("old_logprobs", "advantages", "mask")]
    held = kl_cov.select(*args, Alone(), cov_ratio=ratio)["held"]
    tokens = int(batch["mask"].sum())
    assert int(held.sum()) == (max(int(ratio * tokens), 1) if tokens else 0)
    rest = batch["mask"] & ~held
    if held.any() and rest.any():
        assert covariance(batch)[held].min() >= covariance(batch)[rest].max() - 1e-12


@given(st.integers(0, 200), st.floats(0.01, 1.0))
def test_clip_cov_spreads_over_its_candidates(seed: int, ratio: float) -> None:
    batch = random_rows(seed)
    args = [batch[name] for name in ("old_logprobs", "advantages", "mask")]
    detached = clip_cov.select(*args, Alone(), cov_ratio=ratio, cov_low=-0.5, cov_high=1.0)["detached"]
    values = covariance(batch)
    candidates = values[batch["mask"] & (values > -0.5) & (values < 1.0)].sort().values
    wanted = min(max(int(ratio * int(batch["mask"].sum())), 1), len(candidates))
    chosen = values[detached].sort().values
    assert len(chosen) == wanted
    # between two that are chosen lie about as many as between any other two
    places = torch.searchsorted(candidates, chosen - 1e-12)
    if wanted > 1:
        assert int(places.diff().max()) - int(places.diff().min()) <= 1
        assert abs(int(places[0]) - (len(candidates) - 1 - int(places[-1]))) <= 1


def test_selected_tokens_of_clip_cov_have_no_gradient_and_still_count() -> None:
    batch = row([0.0, 0.1, -0.1], 1.0)
    columns = [batch[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    found = clip_cov.clip_cov(*columns, prepared={"detached": torch.tensor([False, True, False])})
    slopes = gradient(found, batch)
    assert slopes[1] == 0
    assert (slopes[[0, 2]] < 0).all()
    assert [int(x) for x in found.sums["covariance_selected"]] == [1, 3]
    assert int(found.sums["clip_fraction"][1]) == 3


def test_held_tokens_of_kl_cov_are_pulled_back() -> None:
    batch = row([0.3, 0.3, -0.3], 0.0)
    columns = [batch[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    found = kl_cov.kl_cov(*columns, prepared={"held": torch.tensor([False, True, True])}, kl_coef=0.6)
    assert (3 * gradient(found, batch)).tolist() == pytest.approx([0.0, 0.6, -0.6])
