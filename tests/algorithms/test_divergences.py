"""Dense divergences: exact zeros, limits, gradients, and options out of range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.divergences import DIVERGENCES, check_divergence, kl
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads, reads_of

FULL = ("forward_kl", "reverse_kl", "jsd", "entropy_opd")
EVERY = ("entropy_opd", "entropy_opd_additive", "forward_kl", "jsd", "reverse_kl", "sampled_token", "taid")
JSD = [("jsd", {"alpha": alpha}) for alpha in (0.0, 0.1, 0.5, 0.9, 1.0)]


def draw(seed: int = 0, tokens: int = 5, words: int = 9, dtype: torch.dtype = torch.float64):
    """Logits of a student and a teacher [n, W], targets [n]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, tokens, words, generator=generator, dtype=torch.float64).to(dtype)
    return logits[0], logits[1], torch.randint(words, (tokens,), generator=generator)


def loss(name: str, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, t: float = 0.6, **options):
    """From logits."""
    function = DIVERGENCES.get(name, where="")
    more = {read: {"targets": targets, "t": t}[read] for read in reads_of(function)}
    return function(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), **more, **options)


def gradient(name: str, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(name, leaf, teacher, targets, **options).sum(), leaf)[0]


def test_all_are_registered() -> None:
    assert set(EVERY) <= set(DIVERGENCES.names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FULL), *JSD])
def test_identical_distributions_are_exactly_0_apart_and_earn_no_gradient(name, options, dtype) -> None:
    student, _, _ = draw(words=500, dtype=dtype)
    log_p = torch.log_softmax(20 * student, -1).requires_grad_()
    result = DIVERGENCES.get(name, where="")(log_p, log_p.detach().clone(), **options)
    assert torch.equal(result, torch.zeros_like(result))
    assert not torch.autograd.grad(result.sum(), log_p)[0].any()


@pytest.mark.parametrize("name", ["sampled_token", "entropy_opd_additive", "taid"])
def test_at_the_teacher_the_gradient_is_0(name: str) -> None:
    student, _, targets = draw(dtype=torch.float32)
    assert gradient(name, student, student.clone(), targets).abs().max() < 1e-7


@given(st.integers(0, 10_000), st.sampled_from([*((name, {}) for name in FULL), *JSD]))
def test_never_negative_and_gradients_add_up_to_0(seed: int, divergence) -> None:
    name, options = divergence
    student, teacher, targets = draw(seed, dtype=torch.float32)
    assert (loss(name, student, teacher, targets, **options) >= -1e-6).all()
    slopes = gradient(name, student, teacher, targets, **options)
    assert slopes.sum(-1).abs().max() < 1e-5  # a constant on all logits changes nothing


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FULL), *JSD])
def test_gradcheck(name: str, options: dict) -> None:
    student, teacher, targets = draw()
    assert torch.autograd.gradcheck(
        lambda logits: loss(name, logits, teacher, targets, **options), student.requires_grad_()
    )


@pytest.mark.parametrize("name", EVERY)
def test_the_largest_differences_stay_finite(name: str) -> None:
    student, teacher = torch.zeros(2, 1, 3)
    student[0, 0], teacher[0, 1] = 500.0, 500.0
    targets = torch.tensor([0])
    for one, other in ((student, teacher), (teacher, student), (student, student)):
        assert torch.isfinite(loss(name, one, other, targets)).all()
        assert torch.isfinite(gradient(name, one, other, targets)).all()


def test_kl_is_the_textbook_sum() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    torch.testing.assert_close(kl(p.log(), q.log()), torch.tensor([0.25 * math.log(2)]))


def test_jsd_is_symmetric_at_a_half_and_at_most_log_2() -> None:
    student, teacher, targets = draw(3)
    there, back = loss("jsd", student, teacher, targets), loss("jsd", teacher, student, targets)
    torch.testing.assert_close(there, back)
    apart = 1000 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(loss("jsd", apart[:1], apart[1:], targets[:1]), torch.tensor([math.log(2)]).double())


def test_jsd_jumps_at_its_ends() -> None:
    student, teacher, targets = draw(1)
    forward, reverse = (loss(name, student, teacher, targets) for name in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(loss("jsd", student, teacher, targets, alpha=0.0), forward)
    torch.testing.assert_close(loss("jsd", student, teacher, targets, alpha=1.0), reverse)
    small = 1e-5  # the limits: the divergence itself vanishes as α KL(T‖S) and (1−α) KL(S‖T)
    near_0, near_1 = (loss("jsd", student, teacher, targets, alpha=a) for a in (small, 1 - small))
    torch.testing.assert_close(near_0 / small, forward, rtol=1e-2, atol=0)
    torch.testing.assert_close(near_1 / small, reverse, rtol=1e-2, atol=0)


def test_taid_at_0_does_not_depend_on_the_teacher_and_has_no_gradient() -> None:
    student, teacher, targets = draw(2, dtype=torch.float32)
    at_0 = loss("taid", student, teacher, targets, t=0.0)
    assert torch.equal(at_0, loss("taid", student, -3 * teacher, targets, t=0.0))
    log_p = torch.log_softmax(student, -1).requires_grad_()
    result = DIVERGENCES.get("taid", where="")(log_p, torch.log_softmax(teacher, -1), t=0.0)
    assert not torch.autograd.grad(result.sum(), log_p)[0].any()


def test_taid_at_1_is_forward_kl_and_the_teachers_entropy() -> None:
    student, teacher, targets = draw(2)
    log_q = torch.log_softmax(teacher, -1)
    expected = loss("forward_kl", student, teacher, targets) - (log_q.exp() * log_q).sum(-1)
    torch.testing.assert_close(loss("taid", student, teacher, targets, t=1.0), expected)
    torch.testing.assert_close(
        gradient("taid", student, teacher, targets, t=1.0), gradient("forward_kl", student, teacher, targets)
    )


def test_the_soft_gate_goes_from_reverse_to_forward() -> None:
    student, _, targets = draw(4)
    sure, unsure = 100 * torch.eye(9, dtype=torch.float64)[:5], torch.zeros(5, 9, dtype=torch.float64)
    for teacher, name in ((sure, "reverse_kl"), (unsure, "forward_kl")):
        torch.testing.assert_close(
            loss("entropy_opd", student, teacher, targets), loss(name, student, teacher, targets)
        )
    uneven = torch.zeros(5, 9, dtype=torch.float64)
    uneven[:, 0] = 3.0
    assert torch.equal(
        loss("entropy_opd", student, uneven, targets, h_max=0.01), loss("forward_kl", student, uneven, targets)
    )


def test_the_additive_variant_adds_forward_kl_above_the_threshold_only() -> None:
    student, teacher, targets = draw(5, tokens=40)
    teacher = teacher * torch.linspace(0.1, 4, 40, dtype=torch.float64)[:, None]
    log_q = torch.log_softmax(teacher, -1)
    unsure = -(log_q.exp() * log_q).sum(-1) > 0.8
    assert unsure.any()
    assert not unsure.all()
    added = loss("entropy_opd_additive", student, teacher, targets) - loss("sampled_token", student, teacher, targets)
    assert not added[~unsure].any()
    torch.testing.assert_close(added[unsure], loss("forward_kl", student, teacher, targets)[unsure])


def test_the_sampled_tokens_gradient_is_that_of_reverse_kl_on_average() -> None:
    student, teacher, _ = draw(6, tokens=1)
    each = [gradient("sampled_token", student, teacher, torch.tensor([word])) for word in range(9)]
    mean = sum(p * g for p, g in zip(student.softmax(-1)[0], each, strict=True))
    torch.testing.assert_close(mean, gradient("reverse_kl", student, teacher, torch.tensor([0])))


@pytest.mark.parametrize(
    ("name", "options", "where"),
    [
        ("jsd", {"alpha": 1.01}, "alpha"),
        ("jsd", {"alpha": -0.1}, "alpha"),
        ("entropy_opd", {"h_max": 0.0}, "h_max"),
        ("entropy_opd_additive", {"threshold": -1.0}, "threshold"),
        ("taid", {"t_start": 1.2}, "t_start"),
        ("taid", {"t_end": 0.1}, "t_end"),
        ("taid", {"beta": 1.0}, "beta"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, where: str) -> None:
    student, teacher, targets = draw()
    with pytest.raises(UserError) as caught:
        loss(name, student, teacher, targets, **options)
    assert caught.value.where == f"algorithm.distillation.divergence_options.{where}"


@reads("tomorrow")
def clairvoyant(student, teacher, *, tomorrow):
    return student[:, 0]


def demanding(student, teacher, *, scale: float):
    return scale * (student - teacher).square().sum(-1)


@pytest.mark.parametrize(
    ("divergence", "options", "more", "where"),
    [
        ("jds", {}, {}, "algorithm.distillation.divergence"),
        ("no.such.function", {}, {}, "algorithm.distillation.divergence"),
        (clairvoyant, {}, {}, "algorithm.distillation.divergence"),
        ("jsd", {"beta": 0.5}, {}, "algorithm.distillation.divergence_options.beta"),
        ("jsd", {"alpha": "half"}, {}, "algorithm.distillation.divergence_options.alpha"),
        ("forward_kl", {"t": 0.5}, {}, "algorithm.distillation.divergence_options.t"),
        ("taid", {"t": 1.5}, {}, "algorithm.distillation.divergence_options.t"),
        ("taid", {"t": True}, {}, "algorithm.distillation.divergence_options.t"),
        ("sampled_token", {"targets": 3}, {}, "algorithm.distillation.divergence_options.targets"),
        (demanding, {}, {}, "algorithm.distillation.divergence_options.scale"),
        ("sampled_token", {}, {"top_k": 5}, "algorithm.distillation.top_k"),
        ("entropy_opd_additive", {}, {"top_k": 5}, "algorithm.distillation.top_k"),
        ("jsd", {}, {"top_k": 1, "tail": False}, "algorithm.distillation.top_k"),
        ("jsd", {}, {"top_k": 0}, "algorithm.distillation.top_k"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(divergence, options: dict, more: dict, where: str) -> None:
    with pytest.raises(UserError) as caught:
        check_divergence(divergence, options, **more)
    assert caught.value.where == where


def test_good_configurations_pass() -> None:
    assert check_divergence("taid", {"t": None, "t_start": 0.2, "t_end": 1}) is DIVERGENCES.get("taid", where="")
    assert check_divergence("taid", {"t": 0.3}, top_k=1) is DIVERGENCES.get("taid", where="")
    assert check_divergence(demanding, {"scale": 2.0}, top_k=5, tail=False) is demanding
