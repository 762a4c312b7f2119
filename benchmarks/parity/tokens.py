"""Random ragged tokens of a batch, flat as we take them, and the padded view that the oracles take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.parity.case import Tensors
from rlsys.algorithms.aggregation import Aggregation, normaliser, token_weights

# "seq-mean-token-sum-norm" divides by it
HORIZON = 16


def ragged(seed: int, *, per_token: bool = False, drift: float = 0.4, holes: bool = True) -> dict[str, Any]:
    """Log-probs and advantages of rows of 1 … 14 tokens.

    Args:
        per_token: advantages differ by token, not by row only.
        drift: standard deviation of log π − log π_old.
        holes: tokens in the middle of a row are masked (a tool's output); every row keeps one that counts.

    Returns:
        logprobs, old_logprobs, rollout_logprobs, ref_logprobs, advantages, entropy, weights [N] float32; mask [N] bool;
        rows [N] int64; num_rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_rows = int(torch.randint(3, 9, (), generator=generator))
    lengths = torch.randint(1, 15, (num_rows,), generator=generator)
    rows = torch.arange(num_rows).repeat_interleave(lengths)
    size = len(rows)
    old = -3 * torch.rand(size, generator=generator) - 0.05
    advantages = normal(num_rows)[rows] + (0.5 * normal(size) if per_token else 0.0)
    mask = torch.ones(size, dtype=torch.bool)
    if holes:
        mask = torch.rand(size, generator=generator) < 0.8
        mask[lengths.cumsum(0) - 1] = True
    return {
        "logprobs": (old + drift * normal(size)).clamp(max=0),
        "old_logprobs": old,
        "rollout_logprobs": (old + 0.5 * normal(size)).clamp(max=0),
        "ref_logprobs": (old + 0.5 * normal(size)).clamp(max=0),
        "advantages": advantages,
        "entropy": 3 * torch.rand(size, generator=generator),
        "weights": normal(size),
        "mask": mask,
        "rows": rows,
        "num_rows": num_rows,
    }


def padded(values: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """[B, longest] from [N], 0 (false) behind each row; carries a gradient."""
    rows, num_rows = inputs["rows"], inputs["num_rows"]
    lengths = torch.bincount(rows, minlength=num_rows)
    dense = values.new_zeros(num_rows, int(lengths.max()))
    place = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
    return dense.index_put((rows, place), values)


def row_losses(tokens: torch.Tensor, aggregation: Aggregation, inputs: dict[str, Any]) -> torch.Tensor:
    """[B + 1]: what each row adds to the aggregated loss, and the loss itself."""
    mask, rows, num_rows = inputs["mask"], inputs["rows"], inputs["num_rows"]
    total = normaliser(aggregation, mask, rows, num_rows) or 1.0
    tokens = tokens * token_weights(aggregation, mask, rows, num_rows, HORIZON) / total
    by_row = tokens.new_zeros(num_rows).index_add(0, rows, tokens)
    return torch.cat([by_row, tokens.sum()[None]])


def with_gradient(losses: Callable[[torch.Tensor], torch.Tensor], inputs: dict[str, Any]) -> Tensors:
    """What rows add to the loss (their sum, in which large terms cancel, would say nothing about relative errors), and
    the gradient of the loss.

    Args:
        losses: flat log-probs [N] to [B + 1], as in :func:`row_losses`.
    """
    logprobs = inputs["logprobs"].clone().requires_grad_()
    values = losses(logprobs)
    (gradient,) = torch.autograd.grad(values[-1], logprobs)
    return {"loss by row": values[:-1].detach(), "grad logprobs": gradient}
