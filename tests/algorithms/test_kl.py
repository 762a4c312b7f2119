"""KL estimators against verl's, value and gradient, and against the KL that they estimate."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.kl import kl_estimate

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
