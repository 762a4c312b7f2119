"""Policy losses against verl's, and against loops in float64 where verl has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import HORIZON, padded, ragged, row_losses, with_gradient
from rlsys.algorithms.aggregation import Aggregation
from rlsys.algorithms.collective import Alone
from rlsys.algorithms.losses import POLICY_LOSSES, prepare_of
from rlsys.config.plugins import reads_of


def ours(name: str, aggregation: Aggregation, options: dict[str, Any], inputs: dict[str, Any]) -> Tensors:
    """One of our losses, aggregated."""
    function = POLICY_LOSSES.get(name, where="algorithm.loss")
    old, advantages, mask = inputs["old_logprobs"], inputs["advantages"], inputs["mask"]
    prepare = prepare_of(function)
    known = {**inputs, "prepared": prepare(old, advantages, mask, Alone(), **options) if prepare else {}}
    extra = {read: known[read] for read in reads_of(function)}

    def losses(logprobs: torch.Tensor) -> torch.Tensor:
        found = function(logprobs, old, advantages, mask, **extra, **options)
        return row_losses(found.tokens, aggregation, inputs)

    return with_gradient(losses, inputs)


def verl_config(**options: Any) -> Any:
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    low, high = options.pop("low", 0.2), options.pop("high", 0.2)
    dual, taus = options.pop("dual", 1e9), {k: options.pop(k) for k in ("tau_pos", "tau_neg") if k in options}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
        policy_loss=PolicyLossConfig(**options),
        global_batch_info={"loss_scale_factor": HORIZON},
        **taus,
    )


def verl(mode: str, aggregation: str, options: dict[str, Any], inputs: dict[str, Any], *, old: str = "old") -> Tensors:
    """One of verl's losses; what a row adds to it by the weight that its rollout correction takes."""
    from verl.trainer.ppo import core_algos

    function, config = core_algos.get_policy_loss_fn(mode), verl_config(**options)
    old_logprobs, advantages = padded(inputs[f"{old}_logprobs"], inputs), padded(inputs["advantages"], inputs)
    mask = padded(inputs["mask"].float(), inputs)

    def losses(logprobs: torch.Tensor) -> torch.Tensor:
        def loss(rows: torch.Tensor | None) -> torch.Tensor:
            weights = None if rows is None else rows[:, None].expand_as(mask)
            dense = padded(logprobs, inputs)
            return function(old_logprobs, dense, advantages, mask, aggregation, config, weights)[0]

        return torch.stack([*(loss(row) for row in torch.eye(inputs["num_rows"])), loss(None)])

    return with_gradient(losses, inputs)


def verl_geo_mean(options: dict[str, Any], inputs: dict[str, Any]) -> Tensors:
    """verl's geo_mean takes the logarithm of that weight: rows are given to it one by one."""
    from verl.trainer.ppo import core_algos

    config, mask = verl_config(**options), padded(inputs["mask"].float(), inputs)
    old, advantages = padded(inputs["old_logprobs"], inputs), padded(inputs["advantages"], inputs)

    def losses(logprobs: torch.Tensor) -> torch.Tensor:
        dense, count = padded(logprobs, inputs), inputs["num_rows"]

        def loss(part: slice) -> torch.Tensor:
            return core_algos.compute_policy_loss_geo_mean(
                old[part], dense[part], advantages[part], mask[part], config=config
            )[0]

        return torch.stack([*(loss(slice(row, row + 1)) / count for row in range(count)), loss(slice(None))])

    return with_gradient(losses, inputs)


Token = Callable[[float, float, float, float], tuple[float, float]]


def loops(token: Token, inputs: dict[str, Any]) -> Tensors:
    """Token-mean of a loss given as (log π, log π_old, log μ, A) → (value, derivative by log π), in Python floats."""
    count = int(inputs["mask"].sum())
    rows = [0.0] * inputs["num_rows"]
    gradient = []
    names = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages")
    columns = [inputs[name].double().tolist() for name in names]
    for i, (live, row) in enumerate(zip(inputs["mask"].tolist(), inputs["rows"].tolist(), strict=True)):
        value, slope = token(*(column[i] for column in columns)) if live else (0.0, 0.0)
        rows[row] += value / count
        gradient.append(slope / count)
    return {
        "loss by row": torch.tensor(rows, dtype=torch.float64),
        "grad logprobs": torch.tensor(gradient, dtype=torch.float64),
    }


def dppo_token(logp: float, old: float, logmu: float, advantage: float, low: float, high: float, kl: float) -> Any:
    log_ratio, moved = logp - logmu, math.exp(logp) - math.exp(logmu)
    dropped = moved > high if advantage > 0 else moved < -low
    policy = 0.0 if dropped else -advantage * math.exp(log_ratio)
    return policy + kl * log_ratio**2, policy + 2 * kl * log_ratio


def decoupled_token(logp: float, old: float, logmu: float, advantage: float, cap: float, clamp: bool) -> Any:
    weight = math.exp(old - logmu)
    if weight > cap:
        weight = cap if clamp else 0.0
    ratio = math.exp(logp - old)
    if (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8):
        bound = 1.2 if advantage > 0 else 0.8
        return -weight * bound * advantage, 0.0
    return -weight * ratio * advantage, -weight * ratio * advantage


def on_policy(inputs: dict[str, Any]) -> dict[str, Any]:
    """π = π_old, where verl's selection by covariance (under π, of one micro-batch) is ours."""
    return inputs | {"logprobs": inputs["old_logprobs"].clone()}


def gradient_only(found: Tensors) -> Tensors:
    return {"grad logprobs": found["grad logprobs"]}


def against_verl(
    what: str,
    mode: str,
    options: dict[str, Any],
    theirs: dict[str, Any],
    aggregation: Aggregation = "token-mean",
    *,
    draw: Callable[[int], dict] = ragged,
    suffix: str = "",
    only: Callable[[Tensors], Tensors] = lambda found: found,
    old: str = "old",
) -> Case:
    return Case(
        name=f"losses/{what}{suffix}",
        oracle=f"verl 0.9.1 core_algos.compute_policy_loss_{mode}",
        draw=draw,
        ours=lambda inputs: only(ours(what, aggregation, options, inputs)),
        theirs=lambda inputs: only(verl(mode, aggregation, theirs, inputs, old=old)),
    )


def against_loops(what: str, options: dict[str, Any], token: Token, suffix: str = "") -> Case:
    return Case(
        name=f"losses/{what}{suffix}",
        oracle="float64 reference",
        draw=ragged,
        ours=lambda inputs: ours(what, "token-mean", options, inputs),
        theirs=lambda inputs: loops(token, inputs),
    )


_tokens = partial(ragged, per_token=True)
_small = partial(ragged, drift=1e-3)  # sequence ratios on both sides of GSPO's bounds
_cov = {"cov_ratio": 0.9, "cov_low": 0.3, "cov_high": 5.0}  # all candidates are selected: verl draws none at random
_verl_cov = {"clip_cov_ratio": 0.9, "clip_cov_lb": 0.3, "clip_cov_ub": 5.0}

CASES = [
    against_verl("ppo_clip", "vanilla", {}, {}, draw=_tokens),
    against_verl(
        "ppo_clip", "vanilla", {"dual_clip": 1.5}, {"dual": 1.5}, draw=partial(ragged, drift=1.0), suffix=" (dual clip)"
    ),
    against_verl("dapo", "vanilla", {}, {"low": 0.2, "high": 0.28}, draw=_tokens),
    against_verl("gspo", "gspo", {}, {"low": 3e-4, "high": 4e-4}, "seq-mean-token-mean", draw=_small),
    against_verl(
        "gspo",
        "gspo",
        {"clip_low": 0.1, "clip_high": 0.1},
        {"low": 0.1, "high": 0.1},
        "seq-mean-token-mean",
        draw=_tokens,
        suffix=" (advantages by token)",
    ),
    against_verl(
        "cispo",
        "cispo",
        {"clip_low": 0.2, "clip_high": 0.28},
        {"low": 0.2, "high": 0.28},
        draw=_tokens,
        suffix=" (window)",
    ),
    against_verl("sapo", "sapo", {}, {"tau_pos": 1.0, "tau_neg": 1.05}, "seq-mean-token-mean", draw=_tokens),
    Case(
        name="losses/gmpo",
        oracle="verl 0.9.1 core_algos.compute_policy_loss_geo_mean",
        draw=ragged,
        ours=lambda inputs: ours("gmpo", "seq-mean-token-mean", {"clip_low": 0.3, "clip_high": 0.4}, inputs),
        theirs=lambda inputs: verl_geo_mean({"low": 0.3, "high": 0.4}, inputs),
    ),
    against_verl("gpg", "gpg", {}, {}),
    against_verl(
        "clip_cov", "clip_cov", _cov, _verl_cov, draw=lambda seed: on_policy(_tokens(seed)), suffix=" (π = π_old)"
    ),
    against_verl(
        "kl_cov",
        "kl_cov",
        {"cov_ratio": 0.2, "kl_coef": 0.5},
        {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5},
        draw=lambda seed: on_policy(_tokens(seed)),
        suffix=" (π = π_old)",
    ),
    against_verl(
        "dppo_tv",
        "dppo_tv",
        {"kl_tau": 0.0, "ratio_cap": 1.3, "mask_low": 0.1, "mask_high": 0.15},
        {"dual": 1.3, "low": 0.1, "high": 0.15},
        draw=_tokens,
        suffix=" (no KL, capped: gradient)",
        only=gradient_only,
        old="rollout",
    ),
    against_loops("dppo_tv", {"kl_tau": 0.01}, partial(dppo_token, low=0.2, high=0.2, kl=0.01)),
    against_loops("decoupled_ppo", {"weight_cap": 1.5}, partial(decoupled_token, cap=1.5, clamp=False), " (drop)"),
    against_loops(
        "decoupled_ppo",
        {"weight_cap": 1.5, "clamp": True},
        partial(decoupled_token, cap=1.5, clamp=True),
        " (clamp)",
    ),
]
