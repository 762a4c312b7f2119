"""KL estimators and the adaptive coefficient against verl's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import ragged
from rlsys.algorithms.kl import adapt, corrected, kl_estimate


def _with_gradient(kl: torch.Tensor, logprobs: torch.Tensor, inputs: dict[str, Any]) -> Tensors:
    (gradient,) = torch.autograd.grad((kl * inputs["weights"]).sum(), logprobs)
    return {"kl": kl.detach(), "grad logprobs": gradient}


def ours(estimator: Any, bias: bool, inputs: dict[str, Any]) -> Tensors:
    logprobs = inputs["logprobs"].clone().requires_grad_()
    kl = kl_estimate(logprobs, inputs["ref_logprobs"], estimator)
    return _with_gradient(corrected(kl, logprobs, inputs["old_logprobs"]) if bias else kl, logprobs, inputs)


def verl(estimator: str, inputs: dict[str, Any]) -> Tensors:
    from verl.trainer.ppo import core_algos

    # in float64: exp(x) − x − 1 loses most digits of a small estimate
    logprobs = inputs["logprobs"].double().requires_grad_()
    kl = core_algos.kl_penalty(logprobs, inputs["ref_logprobs"].double(), estimator)
    return _with_gradient(kl, logprobs, inputs)


def corrected_by_hand(estimator: str, inputs: dict[str, Any]) -> Tensors:
    """ratio · k, and its derivative ratio · (k + k′), token by token in Python floats."""
    values, slopes = [], []
    names = ("logprobs", "old_logprobs", "ref_logprobs", "weights")
    for logp, old, ref, weight in zip(*(inputs[name].double().tolist() for name in names), strict=True):
        ratio, gap = math.exp(logp - old), logp - ref
        value, slope = {
            "k1": (gap, 1.0),
            "k2": (gap**2 / 2, gap),
            "k3": (math.exp(-gap) - 1 + gap, 1 - math.exp(-gap)),
        }[estimator]
        values.append(ratio * value)
        slopes.append(weight * ratio * (value + slope))
    return {
        "kl": torch.tensor(values, dtype=torch.float64),
        "grad logprobs": torch.tensor(slopes, dtype=torch.float64),
    }


def controller(inputs: dict[str, Any]) -> Tensors:
    from verl.trainer.ppo.core_algos import AdaptiveKLController

    theirs = AdaptiveKLController(init_kl_coef=0.2, target_kl=0.1, horizon=1000)
    coefs = []
    for kl in inputs["entropy"].tolist():
        theirs.update(kl / 10, n_steps=64)
        coefs.append(theirs.value)
    return {"coef": torch.tensor(coefs, dtype=torch.float64)}


def adapted(inputs: dict[str, Any]) -> Tensors:
    coef, coefs = 0.2, []
    for kl in inputs["entropy"].tolist():
        coef = adapt(coef, kl / 10, target=0.1, horizon=1000, samples=64)
        coefs.append(coef)
    return {"coef": torch.tensor(coefs, dtype=torch.float64)}


CASES = [
    *(
        Case(
            f"kl/{estimator}",
            "verl 0.9.1 core_algos.kl_penalty",
            ragged,
            partial(ours, estimator, False),
            partial(verl, estimator),
        )
        for estimator in ("k1", "abs", "k2", "k3", "k3+")
    ),
    *(
        Case(
            f"kl/{estimator}, corrected",
            "float64 reference",
            ragged,
            partial(ours, estimator, True),
            partial(corrected_by_hand, estimator),
        )
        for estimator in ("k1", "k2", "k3")
    ),
    Case("kl/adaptive coefficient", "verl 0.9.1 core_algos.AdaptiveKLController", ragged, adapted, controller),
]
