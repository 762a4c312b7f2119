"""The critic's loss against verl's, with and without the clip."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import padded, ragged
from rlsys.algorithms.channels import ValueLoss
from rlsys.algorithms.objective import ForwardOutput, ResponseBatch


def draw(seed: int) -> dict[str, Any]:
    """Values before and after an update that moves about half of them beyond a clip of 0.5, and returns."""
    inputs = ragged(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(len(inputs["rows"]), generator=generator)

    old = normal()
    return inputs | {"values": old, "returns": old + normal(), "predicted": old + 0.75 * normal()}


def ours(clip: float | None, inputs: dict[str, Any]) -> Tensors:
    """What each row adds to the loss, the gradient of the loss, and the fraction of clipped tokens."""
    predicted = inputs["predicted"].clone().requires_grad_()
    columns = {name: inputs[name] for name in ("values", "returns")} | {"response_mask": inputs["mask"]}

    def loss(mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
        batch = ResponseBatch(columns | {"response_mask": mask}, inputs["rows"], inputs["num_rows"])
        nothing = torch.zeros_like(predicted)
        sums = ValueLoss(clip).loss(batch, ForwardOutput(nothing, nothing, values=predicted), {})
        return sums.loss_sum / inputs["mask"].sum(), sums

    by_row = [loss(inputs["mask"] & (inputs["rows"] == row))[0].detach() for row in range(inputs["num_rows"])]
    whole, sums = loss(inputs["mask"])
    (gradient,) = torch.autograd.grad(whole, predicted)
    clipped, count = sums.sums.get("clip_fraction", (torch.zeros(()), torch.ones(())))
    return {"loss by row": torch.stack(by_row), "grad values": gradient, "clip fraction": clipped / count}


def verl(clip: float | None, inputs: dict[str, Any]) -> Tensors:
    """The same; a range without end is no clip."""
    from verl.trainer.ppo.core_algos import compute_value_loss

    predicted = inputs["predicted"].clone().requires_grad_()
    dense = [padded(values, inputs) for values in (predicted, inputs["returns"], inputs["values"])]
    mask = padded(inputs["mask"].float(), inputs)
    limit, tokens = math.inf if clip is None else clip, int(mask.sum())
    rows = torch.eye(inputs["num_rows"])
    by_row = [compute_value_loss(*dense, mask * row[:, None], limit, batch_num_tokens=tokens)[0] for row in rows]
    whole, clipped = compute_value_loss(*dense, mask, limit)
    (gradient,) = torch.autograd.grad(whole, predicted)
    return {"loss by row": torch.stack(by_row).detach(), "grad values": gradient, "clip fraction": clipped}


CASES = [
    Case(
        f"values/{'no clip' if clip is None else f'clip {clip}'}",
        "verl 0.9.1 core_algos.compute_value_loss",
        draw,
        partial(ours, clip),
        partial(verl, clip),
    )
    for clip in (None, 0.5, 0.05)
]
