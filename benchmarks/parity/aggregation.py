"""Aggregations against verl's ``agg_loss``, with rows that are masked throughout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import HORIZON, padded, ragged, row_losses
from rlsys.algorithms.aggregation import Aggregation


def draw(seed: int) -> dict[str, Any]:
    """Any non-negative values will do as token losses: tenths of the entropies."""
    inputs = ragged(seed)
    return inputs | {"mask": inputs["mask"] & (inputs["rows"] != seed % inputs["num_rows"])}


def ours(aggregation: Aggregation, inputs: dict[str, Any]) -> Tensors:
    tokens = (inputs["entropy"] / 10).requires_grad_()
    values = row_losses(tokens, aggregation, inputs)
    (gradient,) = torch.autograd.grad(values[-1], tokens)
    return {"loss": values.detach(), "grad tokens": gradient}


def verl(aggregation: str, inputs: dict[str, Any]) -> Tensors:
    from verl.trainer.ppo.core_algos import agg_loss

    tokens = (inputs["entropy"] / 10).requires_grad_()
    mask, rows = padded(inputs["mask"].float(), inputs), torch.eye(inputs["num_rows"])[:, :, None]

    def loss(part: torch.Tensor | float) -> torch.Tensor:
        return agg_loss(padded(tokens, inputs) * part, mask, aggregation, loss_scale_factor=HORIZON)

    values = torch.stack([*(loss(row) for row in rows), loss(1.0)])
    (gradient,) = torch.autograd.grad(values[-1], tokens)
    return {"loss": values.detach(), "grad tokens": gradient}


CASES = [
    Case(f"aggregation/{name}", "verl 0.9.1 core_algos.agg_loss", draw, partial(ours, name), partial(verl, name))
    for name in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
]
