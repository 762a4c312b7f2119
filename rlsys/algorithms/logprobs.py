"""Log-probs and entropy of given tokens from hidden states, without ever keeping a [tokens, vocabulary] tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 4096,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(target) and the entropy of π = softmax((hidden · weightᵀ + bias) / temperature), in nats.

    The logits of at most ``chunk`` tokens exist at once, in the forward and in the backward pass (which computes them
    again). The matrix product runs in the inputs' dtype; everything after it in float32 at least.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. targets: [N] int64.
        temperature: of the sampler.
        chunk: tokens whose logits exist at once.
        entropy_gradient: whether the entropy carries a gradient; without it the backward pass is cheaper.

    Returns:
        log-probs [N] and entropy [N], float32 (float64 for float64 inputs).
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, chunk, entropy_gradient)
    return logprobs, entropy if entropy_gradient else entropy.detach()


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps hidden states, weights and two numbers a token; the backward pass computes each chunk's softmax again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(tokens, dtype=dtype, device=hidden.device)
        logsumexp, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, bias, temperature)
            log_z = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0] - log_z
            logsumexp[part] = log_z
            logits -= log_z[:, None]  # log p from here on
            entropy[part] = -(logits.exp().mul_(logits)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, entropy)
        ctx.temperature, ctx.chunk, ctx.entropy_gradient = temperature, chunk, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are summed up in float32 even where weights and gradients are bfloat16.
        grad_weight = torch.zeros_like(weight, dtype=logsumexp.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=logsumexp.dtype) if ctx.needs_input_grad[2] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_p = _logits(hidden[part], weight, bias, ctx.temperature).sub_(logsumexp[part, None])
            p = log_p.exp()
            if ctx.entropy_gradient:  # dH/dlogits = −p (log p + H)
                factor = -grad_logprobs[part, None] - grad_entropy[part, None] * (log_p + entropy[part, None])
                grad_logits = p.mul_(factor)
            else:
                grad_logits = p.mul_(-grad_logprobs[part, None])
            grad_logits.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)
        return (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
