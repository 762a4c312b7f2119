"""KL estimators against verl's, value and gradient, and against the KL that they estimate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.kl import adapt, corrected, kl_estimate

ESTIMATORS = ["k1", "abs", "k2", "k3", "k3+"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_matches_verl(estimator: str, seed: int) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(seed)
    reference = -3 * torch.rand(5, 11, generator=generator)
    logprobs = (reference + torch.randn(5, 11, generator=generator)).requires_grad_()
    theirs = core_algos.kl_penalty(logprobs, reference, estimator)
    ours = kl_estimate(logprobs, reference, estimator)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(5, 11, generator=generator)
    gradients = [torch.autograd.grad((kl * weights).sum(), logprobs)[0] for kl in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_unbiased_over_the_whole_vocabulary(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(0.5 * torch.randn(50, generator=generator), -1)
    log_q = torch.log_softmax(0.5 * torch.randn(50, generator=generator), -1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close((log_p.exp() * kl_estimate(log_p, log_q, estimator)).sum(), exact, rtol=1e-5, atol=1e-6)


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    reference, logprobs = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -3.0], requires_grad=True)
    both = kl_estimate(logprobs, reference, "k3+")
    torch.testing.assert_close(both, kl_estimate(logprobs, reference, "k3"))
    (gradient,) = torch.autograd.grad(both.sum(), logprobs)
    torch.testing.assert_close(gradient, (logprobs - reference).detach())


def test_outliers_are_bounded_and_unknown_names_refused() -> None:
    assert kl_estimate(torch.tensor([-100.0]), torch.tensor([0.0]), "k3").item() == 10.0
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_corrected_has_the_gradient_of_the_kl(estimator: str) -> None:
    """Over the whole vocabulary of one position, with samples from a π_old that is neither π nor the reference."""
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = (0.5 * torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_p, log_old, log_ref = (torch.log_softmax(x, -1) for x in (logits, old, ref))
    estimate = kl_estimate(log_p, log_ref, estimator)
    exact = (log_p.exp() * (log_p - log_ref)).sum()
    right = (log_old.exp() * corrected(estimate, log_p, log_old)).sum()
    plain = (log_old.exp() * estimate).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (right, exact, plain)]
    torch.testing.assert_close(right, exact)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[2] - gradients[1]).abs().max() > 1e-3


def test_corrected_takes_one_shape() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(1,\)"):
        corrected(torch.zeros(3), torch.zeros(3), torch.zeros(1))


@given(kl=st.floats(-1, 5), samples=st.integers(1, 1000))
def test_the_coefficient_follows_the_kl(kl: float, samples: int) -> None:
    coef = adapt(0.2, kl, target=0.5, horizon=1000, samples=samples)
    assert abs(coef - 0.2) <= 0.2 * 0.2 * samples / 1000 + 1e-12
    if abs(kl - 0.5) > 1e-6:
        assert (coef > 0.2) == (kl > 0.5)
    assert adapt(0.2, 0.5, target=0.5, horizon=1000, samples=samples) == 0.2


def test_the_coefficient_never_turns_negative() -> None:
    assert adapt(0.2, 0.0, target=0.5, horizon=10, samples=1000) == 0.0
