"""Factors that follow the steps: of the learning rate, and of a channel's weight; and the rule of what decays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "wsd"]


def multiplier(schedule: Schedule, step: int, total: int, warmup: int = 0) -> float:
    """Factor on the base learning rate in optimiser step ``step``, counted from 1.

    All shapes rise as step/warmup first. Then, with P = total − warmup:

    - ``constant``: 1.
    - ``linear``: from 1 in the first step after warm-up by 1/P a step; 1/P in the last.
    - ``cosine``: half a cosine over the same points.
    - ``wsd`` (warm-up, stable, decay): 1 until warmup + ⌊.8P⌋, linear to .1 at warmup + ⌊.98P⌋, to .01 at the end.

    A step past ``total`` has the last one's factor.
    """
    if step < 1:
        raise ValueError(f"optimiser steps count from 1, not {step}")
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    length = total - warmup
    done = min(step, total) - warmup  # 1 … P
    if length <= 0:
        return 1.0
    if schedule == "linear":
        return (length - done + 1) / length
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (done - 1) / length))
    if schedule == "wsd":
        stable, decay = length * 8 // 10, length * 98 // 100
        if done <= stable:
            return 1.0
        if done <= decay:
            return 1.0 - 0.9 * (done - stable) / (decay - stable)
        return 0.1 - 0.09 * (done - decay) / (length - decay)
    raise ValueError(f"unknown schedule '{schedule}'")


def factor(points: Sequence[Sequence[float]], step: int) -> float:
    """Straight lines through points (step, factor); before the first and after the last it stays as it is there.

    Args:
        points: in ascending order of steps; none: 1.
        step: training step, counted from 1.
    """
    if not points:
        return 1.0
    if step <= points[0][0]:
        return float(points[0][1])
    for (left, low), (right, high) in itertools.pairwise(points):
        if step <= right:
            return float(low + (high - low) * (step - left) / (right - left))
    return float(points[-1][1])


def no_decay(name: str, ndim: int) -> bool:
    """Whether weight decay leaves this parameter alone: biases, norms, embeddings, and anything below two dimensions.

    Args:
        name: dotted parameter name. A head tied to the embedding goes by the embedding's name.
        ndim: dimensions of the parameter.
    """
    parts = name.lower().split(".")
    return ndim < 2 or parts[-1] == "bias" or any("norm" in p or "embed" in p or p in ("wte", "wpe") for p in parts)
