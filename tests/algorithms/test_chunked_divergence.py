"""The chunked divergence against one dense computation, and what it keeps in memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.divergences import DIVERGENCES
from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads, reads_of

NAMES = ("entropy_opd", "entropy_opd_additive", "forward_kl", "jsd", "reverse_kl", "sampled_token", "taid")
VOCABULARY = ("entropy_opd", "forward_kl", "jsd", "reverse_kl", "taid")


def draw(tokens: int = 7, words: int = 11, *, bias: bool = True, dtype: torch.dtype = torch.float64, parts: int = 1):
    """The student's hidden states and head with gradient, teacher parts, targets."""
    generator = torch.Generator().manual_seed(tokens * 100 + words)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def head(width: int) -> Head:
        return Head(normal(words, width), normal(words) if bias else None)

    student = Head(*(x if x is None else x.requires_grad_() for x in vars(head(5)).values()))
    shares = (1.0,) if parts == 1 else (0.3, 0.7)
    teacher = [TeacherPart(share, normal(tokens, 4), head(4)) for share in shares]
    return normal(tokens, 5).requires_grad_(), student, teacher, torch.randint(words, (tokens,), generator=generator)


def dense(hidden, head, teacher, name, options, targets, t, temperature, top_k, tail):
    """Everything at once, from the definition."""
    student = torch.log_softmax(torch.nn.functional.linear(hidden, head.weight, head.bias) / temperature, -1)
    logits = sum(
        part.mix * torch.nn.functional.linear(part.hidden, part.head.weight, part.head.bias) for part in teacher
    )
    full = torch.log_softmax(logits / temperature, -1)
    entropy = -(full.exp() * full).sum(-1)
    other = full
    if top_k is not None:
        kept = torch.zeros_like(student, dtype=torch.bool).scatter(1, student.argsort(-1)[:, -top_k:], True)
        student, other = (buckets(log_p, kept, top_k, tail) for log_p in (student, full))
    function = DIVERGENCES.get(name, where="") if isinstance(name, str) else name
    more = {read: {"targets": targets, "t": t}[read] for read in reads_of(function)}
    return function(student, other, **more, **options), full.gather(1, targets[:, None])[:, 0], entropy


def buckets(log_p, kept, top_k, tail):
    probabilities = torch.where(kept, log_p.exp(), 0.0)
    rest = 1 - probabilities.sum(-1, keepdim=True)
    if not tail:
        probabilities, rest = probabilities / (1 - rest), torch.zeros_like(rest)
    return torch.cat([probabilities[kept].view(len(kept), top_k), rest[:, : int(tail)]], 1).log()


def leaves_of(hidden, head):
    return [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None]


def gradients(losses, leaves):
    weights = torch.randn(len(losses), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((losses * weights).sum(), leaves)


@given(
    st.integers(0, 9),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([0.7, 1.0]),
    st.sampled_from(NAMES),
    st.integers(1, 2),
)
def test_matches_dense_whatever_the_chunk(tokens, chunk, bias, temperature, name, parts) -> None:
    hidden, head, teacher, targets = draw(tokens, bias=bias, parts=parts)
    ours = token_divergence(
        hidden, head, teacher, name, {}, targets=targets, t=0.3, temperature=temperature, chunk=chunk
    )
    expected = dense(hidden, head, teacher, name, {}, targets, 0.3, temperature, None, True)
    for mine, other in zip((ours.loss, ours.teacher_logprobs, ours.teacher_entropy), expected, strict=True):
        torch.testing.assert_close(mine, other)
    leaves = leaves_of(hidden, head)
    for mine, other in zip(gradients(ours.loss, leaves), gradients(expected[0], leaves), strict=True):
        torch.testing.assert_close(mine, other)
    assert not ours.teacher_logprobs.requires_grad
    assert not ours.teacher_entropy.requires_grad


@given(st.integers(0, 9), st.integers(2, 10), st.booleans(), st.sampled_from(VOCABULARY))
def test_the_likeliest_words_and_the_rest_match_dense(tokens: int, top_k: int, tail: bool, name: str) -> None:
    hidden, head, teacher, targets = draw(tokens)
    ours = token_divergence(hidden, head, teacher, name, {}, targets=targets, t=0.3, top_k=top_k, tail=tail, chunk=3)
    expected = dense(hidden, head, teacher, name, {}, targets, 0.3, 1.0, top_k, tail)
    for mine, other in zip((ours.loss, ours.teacher_logprobs, ours.teacher_entropy), expected, strict=True):
        torch.testing.assert_close(mine, other)
    leaves = leaves_of(hidden, head)
    for mine, other in zip(gradients(ours.loss, leaves), gradients(expected[0], leaves), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("top_k", [11, 50])
def test_as_many_words_as_there_are_is_the_whole_vocabulary(top_k: int) -> None:
    hidden, head, teacher, _ = draw()
    whole = token_divergence(hidden, head, teacher, "jsd", {}).loss
    assert torch.equal(whole, token_divergence(hidden, head, teacher, "jsd", {}, top_k=top_k).loss)


def test_more_words_see_more() -> None:
    hidden, head, teacher, _ = draw(20)
    losses = [token_divergence(hidden, head, teacher, "jsd", {}, top_k=k).loss for k in (1, 3, 6, 10, 11)]
    for fewer, more in pairwise(losses):  # merging words never raises a divergence
        assert (fewer <= more + 1e-12).all()


def test_a_tail_too_small_for_one_minus_the_sum_still_counts() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)  # Σ of the top 1 rounds to 1
    head = Head(torch.eye(4), None)
    teacher = [TeacherPart(1.0, torch.zeros(1, 4), head)]
    loss = token_divergence(logits, head, teacher, "forward_kl", {}, top_k=1).loss
    tail = torch.log(torch.tensor(3.0)) - 30  # log-prob of the rest; the teacher gives it 3/4
    expected = 0.75 * (torch.tensor(0.75).log() - tail) + 0.25 * torch.tensor(0.25).log()
    torch.testing.assert_close(loss[0], expected)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("name", ["entropy_opd", "forward_kl", "jsd", "reverse_kl"])
def test_gradcheck(name: str, top_k: int | None) -> None:
    hidden, head, teacher, _ = draw(5, 9)

    def losses(hidden, weight, bias):
        return token_divergence(
            hidden, Head(weight, bias), teacher, name, {}, top_k=top_k, temperature=0.8, chunk=2
        ).loss

    assert torch.autograd.gradcheck(losses, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "reverse_kl", "entropy_opd", "sampled_token"])
def test_a_student_that_is_its_teacher_earns_exactly_nothing(name: str) -> None:
    hidden, head, _, targets = draw(300, 40, dtype=torch.float32)
    teacher = [TeacherPart(1.0, hidden.detach(), Head(head.weight.detach(), head.bias.detach()))]
    loss = token_divergence(hidden, head, teacher, name, {}, targets=targets, chunk=64).loss
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), leaves_of(hidden, head)):
        assert not gradient.any()


def test_taid_at_0_is_independent_of_the_teacher() -> None:
    hidden, head, teacher, _ = draw()
    other = draw(7, 11, parts=2)[2]
    results = [token_divergence(hidden, head, each, "taid", {}, t=0.0).loss for each in (teacher, other)]
    assert torch.equal(*results)
    for gradient in torch.autograd.grad(results[0].sum(), leaves_of(hidden, head)):
        assert not gradient.any()


def test_a_fixed_t_goes_before_the_schedules() -> None:
    hidden, head, teacher, _ = draw()
    fixed = token_divergence(hidden, head, teacher, "taid", {"t": 0.2}, t=0.9).loss
    assert torch.equal(fixed, token_divergence(hidden, head, teacher, "taid", {}, t=0.2).loss)


def test_parts_whose_shares_are_of_one_model_are_that_model() -> None:
    hidden, head, (part,), _ = draw()
    halves = [TeacherPart(0.5, part.hidden, part.head)] * 2
    whole, split = (token_divergence(hidden, head, teacher, "jsd", {}) for teacher in ([part], halves))
    torch.testing.assert_close(whole.loss, split.loss)
    torch.testing.assert_close(whole.teacher_entropy, split.teacher_entropy)


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head, (part,), targets = draw()
    part.hidden.requires_grad_()
    part.head.weight.requires_grad_()
    loss = token_divergence(hidden, head, [part], "jsd", {}, targets=targets).loss
    found = torch.autograd.grad(loss.sum(), [hidden, part.hidden, part.head.weight], allow_unused=True)
    assert found[0] is not None
    assert found[1:] == (None, None)


def test_no_tokens_are_still_part_of_the_graph() -> None:
    hidden, head, teacher, targets = draw(0)
    result = token_divergence(hidden, head, teacher, "jsd", {}, targets=targets)
    assert result.loss.shape == result.teacher_logprobs.shape == result.teacher_entropy.shape == (0,)
    result.loss.sum().backward()
    assert hidden.grad.shape == (0, 5)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))
    assert torch.equal(head.bias.grad, torch.zeros_like(head.bias))


def test_a_frozen_head_earns_no_gradient() -> None:
    hidden, head, teacher, _ = draw()
    frozen = Head(head.weight.detach(), head.bias.detach())
    (expected,) = torch.autograd.grad(token_divergence(hidden, head, teacher, "jsd", {}).loss.sum(), hidden)
    (found,) = torch.autograd.grad(token_divergence(hidden, frozen, teacher, "jsd", {}).loss.sum(), hidden)
    assert torch.equal(found, expected)


def test_bfloat16_stays_near_float32() -> None:
    hidden, head, teacher, _ = draw(30, 50, dtype=torch.bfloat16)
    loss = token_divergence(hidden, head, teacher, "jsd", {}, chunk=4).loss
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss.sum(), leaves_of(hidden, head))
    assert all(gradient.dtype == torch.bfloat16 for gradient in found)
    wide = [x.detach().float().requires_grad_() for x in leaves_of(hidden, head)]
    parts = [TeacherPart(1.0, p.hidden.float(), Head(p.head.weight.float(), p.head.bias.float())) for p in teacher]
    whole = token_divergence(wide[0], Head(*wide[1:]), parts, "jsd", {}).loss
    torch.testing.assert_close(loss, whole, atol=0.02, rtol=0.02)
    for mine, other in zip(found, torch.autograd.grad(whole.sum(), wide), strict=True):
        torch.testing.assert_close(mine.float(), other, atol=0.02 * float(other.abs().max()), rtol=0.02)


def test_many_chunks_are_added_up_in_float32() -> None:
    hidden, head, teacher, _ = draw(600, 12, dtype=torch.bfloat16)
    few, many = (
        torch.autograd.grad(token_divergence(hidden, head, teacher, "jsd", {}, chunk=c).loss.sum(), head.weight)[0]
        for c in (600, 1)
    )
    torch.testing.assert_close(few, many, atol=0.0, rtol=0.01)  # one rounding to bfloat16, at the end


@reads("targets", "t")
def of_a_user(student, teacher, *, targets, t, power: float = 2.0):
    surprise = -student.gather(1, targets[:, None])[:, 0]
    return t * (student - teacher).abs().pow(power).sum(-1) + surprise


def test_a_users_own_function() -> None:
    hidden, head, teacher, targets = draw()
    options = {"power": 3.0}
    ours = token_divergence(hidden, head, teacher, of_a_user, options, targets=targets, t=0.5, chunk=2).loss
    expected = dense(hidden, head, teacher, of_a_user, options, targets, 0.5, 1.0, None, True)[0]
    torch.testing.assert_close(ours, expected)
    leaves = leaves_of(hidden, head)
    for mine, other in zip(gradients(ours, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_users_own_by_its_import_path() -> None:
    hidden, head, teacher, _ = draw()
    path = "rlsys.algorithms.divergences.kullback_leibler.forward_kl"
    named = token_divergence(hidden, head, teacher, "forward_kl", {}).loss
    assert torch.equal(named, token_divergence(hidden, head, teacher, path, {}).loss)


def test_a_gradient_that_autograd_only_expands() -> None:
    hidden, head, teacher, _ = draw()
    loss = token_divergence(hidden, head, teacher, lambda student, teacher: student.sum(-1), {}).loss
    expected = torch.log_softmax(torch.nn.functional.linear(hidden, head.weight, head.bias), -1).sum(-1)
    leaves = leaves_of(hidden, head)
    for mine, other in zip(gradients(loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other)


def test_no_tokens_by_words_tensor_is_ever_made() -> None:
    hidden, head, teacher, targets = draw(64, 512, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        loss = token_divergence(hidden, head, teacher, "jsd", {}, targets=targets, chunk=4, top_k=20).loss
        torch.autograd.grad(loss.sum(), leaves_of(hidden, head))
    assert largest == max(4 * 512, 512 * 5)  # a chunk's logits, or the head's gradient


def test_vocabularies_of_different_size_are_refused_with_both() -> None:
    hidden, head, _, _ = draw()
    teacher = [TeacherPart(1.0, torch.zeros(7, 4).double(), Head(torch.zeros(13, 4).double(), None))]
    with pytest.raises(ValueError, match=r"11 and 13 words"):
        token_divergence(hidden, head, teacher, "jsd", {})


@pytest.mark.parametrize("what", ["tokens", "width", "bias", "targets", "no teacher", "no t", "no targets", "shape"])
def test_what_does_not_fit_is_refused(what: str) -> None:
    hidden, head, (part,), targets = draw()
    name, more, teacher = "jsd", {}, [part]
    if what == "tokens":
        teacher = [TeacherPart(1.0, part.hidden[:1], part.head)]  # would broadcast
    elif what == "width":
        teacher = [TeacherPart(1.0, part.hidden, head)]
    elif what == "bias":
        head = Head(head.weight, head.bias[:1])
    elif what == "targets":
        more = {"targets": targets[:1]}
    elif what == "no teacher":
        teacher = []
    elif what == "no t":
        name = "taid"
    elif what == "no targets":
        name = "sampled_token"
    else:
        name = lambda student, teacher: student  # noqa: E731
    with pytest.raises(ValueError, match=r"fit|tokens|bias|targets|part|reads|returned"):
        token_divergence(hidden, head, teacher, name, {}, **more)


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"chunk": 0}])
def test_a_temperature_or_chunk_of_0_is_refused(more: dict) -> None:
    hidden, head, teacher, _ = draw()
    with pytest.raises(ValueError, match=r"positive|at least one"):
        token_divergence(hidden, head, teacher, "jsd", {}, **more)


def test_words_of_the_response_are_not_among_the_likeliest() -> None:
    hidden, head, teacher, targets = draw()
    with pytest.raises(UserError, match="likeliest"):
        token_divergence(hidden, head, teacher, "sampled_token", {}, targets=targets, top_k=3)
