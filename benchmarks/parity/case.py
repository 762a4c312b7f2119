"""A parity case: one number of ours beside the same number of an independent implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One thing that is compared.

    name: ``area/what``, such as ``advantages/grpo (sample std)``.
    oracle: who is right: ``verl 0.9.1 core_algos.compute_grpo_outcome_advantage``, or ``float64 reference``.
    draw: a seed → random ragged inputs, the same for both sides.
    ours, theirs: inputs → tensors by name (values, and gradients under ``grad …``) that must agree.
    """

    name: str
    oracle: str
    draw: Callable[[int], dict]
    ours: Callable[[dict], Tensors]
    theirs: Callable[[dict], Tensors]


def errors(case: Case, seed: int) -> tuple[float, float]:
    """Worst absolute and worst relative error of one draw.

    The relative error of an element is over the larger of its own size and 1 % of its tensor's largest, so that
    round-off in elements near zero does not count as disagreement.

    Raises:
        AssertionError: the two sides disagree about names or shapes, or one of them is not finite.
    """
    inputs = case.draw(seed)
    ours, theirs = case.ours(inputs), case.theirs(inputs)
    assert ours.keys() == theirs.keys(), f"{case.name}: {sorted(ours)} against {sorted(theirs)}"
    absolute = relative = 0.0
    for name, mine in ours.items():
        other = theirs[name].detach().double()
        mine = mine.detach().double()
        assert mine.shape == other.shape, f"{case.name} {name}: {tuple(mine.shape)} against {tuple(other.shape)}"
        assert torch.isfinite(mine).all(), f"{case.name} {name}: ours is not finite"
        assert torch.isfinite(other).all(), f"{case.name} {name}: the oracle is not finite"
        if not mine.numel():
            continue
        gap = (mine - other).abs()
        scale = other.abs().clamp(min=max(1e-2 * float(other.abs().max()), 1e-12))
        absolute, relative = max(absolute, float(gap.max())), max(relative, float((gap / scale).max()))
    return absolute, relative
