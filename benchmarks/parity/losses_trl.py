"""Losses, aggregation, KL and entropy mask together against ``trl.GRPOTrainer._compute_loss``, called on a stub."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import HORIZON, padded, ragged, row_losses, with_gradient
from rlsys.algorithms.aggregation import Aggregation
from rlsys.algorithms.collective import Alone
from rlsys.algorithms.entropy import above_quantile
from rlsys.algorithms.kl import corrected, kl_estimate
from rlsys.algorithms.losses import POLICY_LOSSES
from rlsys.config.plugins import reads_of

_ARGS = {
    "use_bias_correction_kl": False,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "steps_per_generation": 1,
}


def ours(
    name: str, aggregation: Aggregation, options: dict[str, Any], inputs: dict[str, Any], beta: float, **terms: Any
) -> Tensors:
    """Policy loss + beta · KL (``bias``: corrected), policy terms only above the ``quantile`` of entropy."""
    function = POLICY_LOSSES.get(name, where="algorithm.loss")
    old, mask = inputs["old_logprobs"], inputs["mask"]
    extra = {read: inputs[read] for read in reads_of(function)}

    def losses(logprobs: torch.Tensor) -> torch.Tensor:
        tokens = function(logprobs, old, inputs["advantages"], mask, **extra, **options).tokens
        if "quantile" in terms:
            uncertain = above_quantile(inputs["entropy"], mask, terms["quantile"], Alone())
            tokens = torch.where(uncertain, tokens, 0.0)
        if beta:
            kl = kl_estimate(logprobs, inputs["ref_logprobs"], "k3")
            tokens = tokens + beta * (corrected(kl, logprobs, old) if terms.get("bias") else kl)
        return row_losses(tokens, aggregation, inputs)

    return with_gradient(losses, inputs)


def theirs(options: dict[str, Any], inputs: dict[str, Any], beta: float, *, trainer: str = "grpo") -> Tensors:
    """TRL's loss. What a row adds to it: the loss with the other rows' advantages and KL made zero."""
    stub, compute = _stub(options, beta), _compute_loss(trainer)
    mask = padded(inputs["mask"].long(), inputs)
    advantages = torch.zeros(inputs["num_rows"]).index_put((inputs["rows"],), inputs["advantages"])
    old, reference = padded(inputs["old_logprobs"], inputs), padded(inputs["ref_logprobs"], inputs)
    entropy = padded(inputs["entropy"], inputs)

    def losses(logprobs: torch.Tensor) -> torch.Tensor:
        dense = padded(logprobs, inputs)
        stub._get_per_token_logps_and_entropies = lambda *_, **__: (dense, entropy, None)

        def loss(row: torch.Tensor) -> torch.Tensor:
            given = {
                "prompt_ids": mask[:, :0],
                "prompt_mask": mask[:, :0],
                "completion_ids": mask,
                "completion_mask": mask,
                "advantages": torch.where(row, advantages, 0.0),
                "old_per_token_logps": old,
                "ref_per_token_logps": torch.where(row[:, None], reference, dense.detach()),
                "num_items_in_batch": mask.sum(),
            }
            return compute(stub, None, given)

        rows = [loss(row) for row in torch.eye(inputs["num_rows"], dtype=torch.bool)]
        return torch.stack([*rows, loss(torch.ones(inputs["num_rows"], dtype=torch.bool))])

    return with_gradient(losses, inputs)


def _compute_loss(trainer: str) -> Any:
    if trainer == "gmpo":
        from trl.experimental.gmpo import GMPOTrainer

        return GMPOTrainer._compute_loss
    from trl import GRPOTrainer

    return GRPOTrainer._compute_loss


def _stub(options: dict[str, Any], beta: float) -> Any:
    """What the method reads of a trainer: one process, one micro-batch."""
    from trl import GRPOTrainer

    options = dict(options)
    args = {name: options.pop(name, default) for name, default in _ARGS.items()}
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    settings = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0,
    }
    stub = SimpleNamespace(
        **(settings | options),
        args=SimpleNamespace(**args),
        beta=beta,
        accelerator=accelerator,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=HORIZON,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=0.0,
        _metrics={"train": defaultdict(list)},
    )
    stub.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, stub)
    return stub


def case(
    what: str,
    loss: str,
    aggregation: Aggregation,
    options: dict[str, Any],
    trl: dict[str, Any],
    *,
    beta: float = 0.0,
    drift: float = 0.4,
    trainer: str = "grpo",
    **terms: Any,
) -> Case:
    return Case(
        name=f"losses/trl {what}",
        oracle=f"trl 1.16.0 {trainer.upper()}Trainer._compute_loss",
        draw=partial(ragged, drift=drift),
        ours=lambda inputs: ours(loss, aggregation, options, inputs, beta, **terms),
        theirs=lambda inputs: theirs(trl, inputs, beta, trainer=trainer),
    )


_sequence = {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}

CASES = [
    case("grpo", "ppo_clip", "seq-mean-token-mean", {}, {}),
    case("grpo, KL", "ppo_clip", "seq-mean-token-mean", {}, {}, beta=0.1),
    case(
        "grpo, bias-corrected KL",
        "ppo_clip",
        "seq-mean-token-mean",
        {},
        {"use_bias_correction_kl": True},
        beta=0.1,
        bias=True,
    ),
    case("grpo, delta", "ppo_clip", "seq-mean-token-mean", {"dual_clip": 1.5}, {"delta": 1.5}, drift=1.0),
    case("bnpo", "ppo_clip", "token-mean", {}, {"loss_type": "bnpo"}),
    case("dr_grpo", "ppo_clip", "seq-mean-token-sum-norm", {}, {"loss_type": "dr_grpo"}),
    case("dapo", "dapo", "token-mean", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    case("luspo (token ratios)", "ppo_clip", "seq-mean-token-sum", {}, {"loss_type": "luspo"}),
    case("luspo", "gspo", "seq-mean-token-sum", {}, {"loss_type": "luspo", **_sequence}, drift=1e-3),
    case("gspo", "gspo", "seq-mean-token-mean", {}, _sequence, drift=1e-3),
    case("sapo", "sapo", "seq-mean-token-mean", {}, {"loss_type": "sapo"}),
    case(
        "cispo (absolute cap)",
        "cispo",
        "token-mean",
        {"cap": "absolute", "clip_high": 1.2},
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    case(
        "gmpo, KL",
        "gmpo",
        "seq-mean-token-mean",
        {},
        {"epsilon_low": 0.4, "epsilon_high": 0.4},
        beta=0.1,
        trainer="gmpo",
    ),
    case(
        "entropy quantile, KL",
        "dapo",
        "token-mean",
        {},
        {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
        beta=0.1,
        quantile=0.8,
    ),
]
