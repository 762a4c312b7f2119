"""Log-probs and entropy of given tokens from hidden states, without ever keeping a [tokens, vocabulary] tensor.

Both passes go over the logits tile by tile: a block of words at a time, and for each of them all tokens, some at a
time. So the head is read once, its gradient is written once, and a tile is still in the cache when it is read again.
The log-sum-exp is taken along the way: each tile moves the running maximum and sums of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlsys.algorithms.kernels.tiles import Known, Running, Tiles, Workspace, add_product


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy_gradient: bool = False,
    kernels: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(target) and the entropy of π = softmax((hidden · weightᵀ + bias) / temperature), in nats.

    Only a tile of the logits exists at once, in the forward and in the backward pass (which computes them again). The
    matrix products run in the inputs' dtype; everything else, and every sum over tiles, in float32 at least.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. targets: [N] int64, each in [0, V).
        temperature: of the sampler.
        chunk: tokens in a tile, at most; None: what was measured best.
        entropy_gradient: whether the entropy carries a gradient; without it the backward pass is cheaper.
        kernels: whether Triton makes the passes over a tile; None: on CUDA devices where it is installed.

    Returns:
        log-probs [N] and entropy [N], float32 (float64 for float64 inputs).

    Raises:
        ValueError: the temperature is not positive, or a target is no word (on a GPU, where looking would make the
            device wait, its log-prob is NaN instead).
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one token, not {chunk}")
    if targets.device.type == "cpu" and len(targets) and not 0 <= targets.min() <= targets.max() < len(weight):
        span = f"{int(targets.min())} … {int(targets.max())}"
        raise ValueError(f"targets {span} are not all among the {len(weight)} words of the vocabulary")
    plan = _Plan(Tiles.of(hidden, weight, chunk), temperature, entropy_gradient, kernels)
    logprobs, entropy = _TokenLogprobs.apply(plan, hidden, weight, bias, targets.contiguous())
    return logprobs, entropy if entropy_gradient else entropy.detach()


@dataclass(frozen=True)
class _Plan:
    """What is computed and how, without the tensors."""

    tiles: Tiles
    temperature: float
    entropy_gradient: bool
    kernels: bool | None


class _TokenLogprobs(torch.autograd.Function):
    """Keeps hidden states, weights and two numbers a token; the backward pass computes each tile's softmax again."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        running = Running.start(len(hidden), torch.promote_types(hidden.dtype, torch.float32), hidden.device)
        workspace = Workspace(plan.tiles, hidden, plan.temperature, plan.kernels)
        for words in plan.tiles.words:
            for part in plan.tiles.tokens:
                tile = workspace.logits(hidden[part], weight[words], None if bias is None else bias[words])
                workspace.fold(tile, targets[part], words.start, running[part])
        log_total = running.total.log()
        log_z = running.top + log_total
        logprobs, entropy = running.target - log_z, log_total - running.weighted / running.total
        ctx.plan = plan
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        if not plan.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: _Plan = ctx.plan
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        known = Known(
            log_z,
            entropy,
            (grad_logprobs / plan.temperature).contiguous(),
            (grad_entropy / plan.temperature).contiguous() if plan.entropy_gradient else None,
        )
        workspace = Workspace(plan.tiles, hidden, plan.temperature, plan.kernels)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[1:4], plan.tiles, log_z.dtype)
        for words in plan.tiles.words:
            for part in plan.tiles.tokens:
                tile = workspace.logits(hidden[part], weight[words], None if bias is None else bias[words])
                gradients.add(workspace.gradient(tile, targets[part], words.start, known[part]), part, words)
        return (None, *gradients.result(), None)


class _Gradients:
    """Of hidden states, weight and bias, from the logits' gradient tile by tile, words outermost.

    So a block of the weight's gradient is complete before the next one begins: where it is summed up in a wider dtype,
    only that block is.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: tuple[bool, bool, bool],
        tiles: Tiles,
        dtype: torch.dtype,
    ):
        self._inputs, self._tiles = (hidden, weight, bias), tiles
        self._hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
        # With no token there is no tile that would write it.
        self._weight = (torch.empty_like if tiles.tokens else torch.zeros_like)(weight) if wanted[1] else None
        self._bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        self._block = torch.empty(0, dtype=dtype, device=hidden.device)
        if self._weight is not None and weight.dtype != dtype and tiles.tokens:
            self._block = self._block.new_empty(tiles.words[0].stop, weight.shape[1])

    def add(self, tile: torch.Tensor, part: slice, words: slice) -> None:
        """tile: the gradient [n, w] of the logits of these tokens and words."""
        hidden, weight, _ = self._inputs
        if self._bias is not None:
            self._bias[words] += tile.sum(0, dtype=self._bias.dtype)
        tile = tile.to(hidden.dtype)
        if self._hidden is not None:
            only = len(self._tiles.words) == 1
            add_product(self._hidden[part], tile, weight[words], new=words.start == 0, last=only)
        if self._weight is not None:
            block = self._weight[words]
            sums = self._block[: len(block)] if len(self._block) else block
            last = part is self._tiles.tokens[-1]
            add_product(sums, tile.T, hidden[part], new=part.start == 0, last=last)
            if last and sums is not block:
                block.copy_(sums)

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        hidden, _, bias = self._inputs
        return (
            None if self._hidden is None else self._hidden.to(hidden.dtype),
            self._weight,
            None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )
