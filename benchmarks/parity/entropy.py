"""The entropy-quantile mask against TRL's."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import padded, ragged
from rlsys.algorithms.collective import Alone
from rlsys.algorithms.entropy import above_quantile


def ours(quantile: float, inputs: dict[str, Any]) -> Tensors:
    return {"keep": padded(above_quantile(inputs["entropy"], inputs["mask"], quantile, Alone()), inputs)}


def trl(quantile: float, inputs: dict[str, Any]) -> Tensors:
    from trl import GRPOTrainer

    alone = SimpleNamespace(gather=lambda x: x, pad_across_processes=lambda x, dim, pad_index: x)
    entropy, mask = padded(inputs["entropy"], inputs), padded(inputs["mask"].float(), inputs)
    keep = GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=alone), entropy, mask, quantile)
    return {"keep": keep}


CASES = [
    Case(
        f"entropy/above quantile {quantile}",
        "trl 1.16.0 GRPOTrainer.get_high_entropy_mask",
        ragged,
        partial(ours, quantile),
        partial(trl, quantile),
    )
    for quantile in (0.0, 0.5, 0.8, 1.0)
]
