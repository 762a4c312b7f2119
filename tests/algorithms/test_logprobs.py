"""Chunked log-probs and entropy against the dense computation, forward and backward, and what is kept in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.logprobs import token_logprobs


def inputs(
    tokens: int = 13, hidden: int = 8, vocab: int = 29, *, dtype: torch.dtype = torch.float64, bias: bool = True
):
    generator = torch.Generator().manual_seed(tokens * 100 + vocab)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    return states, weight, offset, torch.randint(vocab, (tokens,), generator=generator)


def dense(states, weight, bias, targets, temperature):
    logits = torch.nn.functional.linear(states, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@given(st.integers(0, 20), st.integers(1, 25), st.booleans(), st.sampled_from([0.7, 1.0, 1.5]))
def test_matches_dense_whatever_the_chunk(tokens: int, chunk: int, bias: bool, temperature: float) -> None:
    arguments = inputs(tokens, bias=bias)
    leaves = [a for a in arguments[:3] if a is not None]
    expected = dense(*arguments, temperature)
    actual = token_logprobs(*arguments, temperature=temperature, chunk=chunk, entropy_gradient=True)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradients = [
        torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, pair, strict=True)), leaves)
        for pair in (actual, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(chunk: int, bias: bool) -> None:
    states, weight, offset, targets = inputs(5, 4, 7, bias=bias)

    def both(states, weight, offset=None):
        return token_logprobs(states, weight, offset, targets, temperature=0.7, chunk=chunk, entropy_gradient=True)

    def logprobs_only(states, weight, offset=None):
        return token_logprobs(states, weight, offset, targets, temperature=0.7, chunk=chunk)[0]

    leaves = (states, weight) if offset is None else (states, weight, offset)
    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(logprobs_only, leaves)


def test_entropy_is_detached_unless_asked_for() -> None:
    arguments = inputs()
    assert not token_logprobs(*arguments)[1].requires_grad
    assert token_logprobs(*arguments, entropy_gradient=True)[1].requires_grad


def test_bfloat16_states_get_a_float32_softmax() -> None:
    arguments = inputs(64, 32, 500, dtype=torch.bfloat16, bias=False)
    logprobs, entropy = token_logprobs(*arguments, chunk=10)
    expected = dense(*arguments, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(logprobs.sum(), arguments[:2])
    theirs = torch.autograd.grad(expected[0].sum(), arguments[:2])
    assert {g.dtype for g in ours} == {torch.bfloat16}
    for a, b in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm((a - b).float()) < 2e-2 * torch.linalg.vector_norm(b.float())


def test_no_tensor_of_all_tokens_by_vocabulary_ever_exists() -> None:
    tokens, vocab, chunk = 64, 1000, 8
    states, weight, _, targets = inputs(tokens, 4, vocab, dtype=torch.float32, bias=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        logprobs, entropy = token_logprobs(states, weight, None, targets, chunk=chunk, entropy_gradient=True)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest == chunk * vocab


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(*inputs(), temperature=0.0)
