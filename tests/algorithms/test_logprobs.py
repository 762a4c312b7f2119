"""Chunked log-probs and entropy against the dense computation, forward and backward, and what is kept in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.kernels import tiles
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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 4 tokens by 16 words: everything is cut in both directions."""
    monkeypatch.setattr(tiles, "_CPU", tiles._Size(tokens=4, elements=64, words=16))


@given(st.integers(0, 3000), st.integers(1, 500))
def test_slices_cover_everything_once_and_the_first_is_the_largest(total: int, most: int) -> None:
    slices = tiles.even_slices(total, most)
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(total))
    assert len(slices) == -(-total // most)
    sizes = [part.stop - part.start for part in slices]
    assert all(0 < size <= sizes[0] <= most for size in sizes)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(("tokens", "vocab"), [(0, 40), (1, 1), (1, 40), (3, 16), (9, 33), (13, 47)])
def test_ragged_tiles_match_dense(tokens: int, vocab: int, entropy_gradient: bool) -> None:
    arguments = inputs(tokens, 8, vocab)
    expected = dense(*arguments, 0.7)
    actual = token_logprobs(*arguments, temperature=0.7, entropy_gradient=entropy_gradient)
    sums = []
    for pair in (actual, expected):
        torch.testing.assert_close(pair, expected)
        loss = (pair[0] * torch.arange(1, tokens + 1)).sum() + (pair[1].sum() if entropy_gradient else 0)
        sums.append(torch.autograd.grad(loss, arguments[:3]))
    torch.testing.assert_close(*sums)


@pytest.mark.usefixtures("small_tiles")
def test_logits_of_hundreds_that_grow_from_tile_to_tile() -> None:
    states, weight, bias, targets = inputs(9, 8, 90, dtype=torch.float32)
    bias = torch.linspace(-800, 800, 90)
    ours = token_logprobs(states, weight, bias, targets)
    theirs = dense(states.double(), weight.double(), bias.double(), targets, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-4)


@pytest.mark.usefixtures("small_tiles")
def test_a_tile_of_impossible_words_leaves_the_rest_as_it_is() -> None:
    states, weight, bias, targets = inputs(9, 8, 40)
    masked = bias.detach().clone()
    masked[:16] = -torch.inf
    logprobs, _ = token_logprobs(states, weight, masked, targets % 24 + 16)
    expected = token_logprobs(states, weight[16:], bias[16:], targets % 24)[0]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.usefixtures("small_tiles")
def test_bfloat16_gradients_are_summed_over_tiles_without_rounding() -> None:
    states, weight, _, targets = inputs(40, 16, 90, dtype=torch.bfloat16, bias=False)
    exact = [x.detach().double().requires_grad_() for x in (states, weight)]
    reference = torch.autograd.grad(dense(*exact, None, targets, 1.0)[0].sum(), exact)
    ours = torch.autograd.grad(token_logprobs(states, weight, None, targets)[0].sum(), (states, weight))
    whole = torch.autograd.grad(dense(states, weight, None, targets, 1.0)[0].sum(), (states, weight))
    for a, b, c in zip(ours, whole, reference, strict=True):
        error, error_of_dense = (torch.linalg.vector_norm(x.double() - c) for x in (a, b))
        assert error < 1.1 * error_of_dense


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


def test_a_target_that_is_no_word_is_refused() -> None:
    states, weight, bias, targets = inputs()
    for wrong in (-1, len(weight)):
        with pytest.raises(ValueError, match="targets"):
            token_logprobs(states, weight, bias, torch.full_like(targets, wrong))


def test_a_chunk_of_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        token_logprobs(*inputs(), chunk=0)
