"""Preference losses against TRL's, from token log-probs on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from rlsys.algorithms.preferences import PREFERENCE_LOSSES, PairLogprobs, pair_sums

TRL = "trl 1.16.0"
LOOPS = "float64 reference"
SIDES = ("chosen", "rejected")


def draw(seed: int) -> dict[str, Any]:
    """Ragged responses with holes: of each side log-probs of policy and reference [N], mask, rows; and pair weights."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    pairs = integer(2, 9)
    sides = {}
    for side in SIDES:
        rows = torch.arange(pairs).repeat_interleave(torch.randint(1, 12, (pairs,), generator=generator))
        policy = -2 * torch.rand(len(rows), generator=generator) - 0.05
        mask = torch.rand(len(rows), generator=generator) < 0.8
        mask[torch.cat([torch.ones(1, dtype=torch.bool), rows.diff() > 0])] = True
        reference = policy + 0.2 * torch.randn(len(rows), generator=generator)
        sides[side] = {"policy": policy, "reference": reference, "mask": mask, "rows": rows}
    return {**sides, "pairs": pairs}


def leaves_of(inputs: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    return [inputs[side]["policy"].to(dtype).clone().requires_grad_() for side in SIDES]


def results(loss: torch.Tensor, leaves: list[torch.Tensor], **more: torch.Tensor) -> Tensors:
    """loss: the mean over pairs."""
    found = torch.autograd.grad(loss, leaves)
    return {"loss": loss, **more} | {f"grad {side}": g for side, g in zip(SIDES, found, strict=True)}


def ours(name: str, options: dict[str, Any], reference: bool, inputs: dict) -> Tensors:
    leaves = leaves_of(inputs, torch.float32)
    sides = []
    for leaf, side in zip(leaves, SIDES, strict=True):
        drawn = inputs[side]
        policy, lengths = pair_sums(leaf, drawn["mask"], drawn["rows"], inputs["pairs"])
        known = pair_sums(drawn["reference"], drawn["mask"], drawn["rows"], inputs["pairs"])[0] if reference else None
        sides.append(PairLogprobs(policy, known, lengths))
    result = PREFERENCE_LOSSES.get(name, where="")(*sides, **options)
    return results(result.pairs.mean(), leaves)


# --- TRL -------------------------------------------------------------------------------------------------------------


def padded(flat: torch.Tensor, rows: torch.Tensor, pairs: int, width: int) -> torch.Tensor:
    """[P, width], 0 behind each row."""
    place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
    return flat.new_zeros(pairs, width).index_put((rows, place), flat)


def trl_dpo(loss_type: str, beta: float, inputs: dict) -> Tensors:
    """``DPOTrainer._compute_loss`` on a trainer and a model that only hand over log-probs."""
    from trl import DPOTrainer

    leaves = leaves_of(inputs, torch.float64)
    width = max(int(inputs[side]["rows"].bincount().max()) for side in SIDES)

    def both(values: Callable[[int, dict], torch.Tensor]) -> torch.Tensor:
        parts = [
            padded(values(i, inputs[side]) * inputs[side]["mask"], inputs[side]["rows"], inputs["pairs"], width)
            for i, side in enumerate(SIDES)
        ]
        return torch.cat(parts)

    completion = both(lambda i, side: side["mask"].long())
    tokens = torch.nn.functional.pad(completion, (1, 0))  # a prompt of one token
    output = SimpleNamespace(
        log_probs=both(lambda i, side: leaves[i]),
        entropy=torch.zeros(completion.shape),
        mean_logits=torch.zeros(completion.shape),
        is_top1=torch.zeros(completion.shape, dtype=torch.bool),
    )
    reference = SimpleNamespace(log_probs=both(lambda i, side: side["reference"].double()))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        ref_model=lambda **_: reference,
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    known = reference.log_probs.sum(1).chunk(2)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": tokens,
        "ref_chosen_logps": known[0],
        "ref_rejected_logps": known[1],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: output, batch, False)
    return results(loss, leaves)


def trl_cpo(options: dict[str, Any], averaged: bool, inputs: dict) -> Tensors:
    """``CPOTrainer.cpo_loss``: on averaged log-probs, or on summed log-ratios in place of log-probs."""
    from trl.experimental.cpo import CPOTrainer

    leaves = leaves_of(inputs, torch.float64)
    sides = []
    for leaf, side in zip(leaves, SIDES, strict=True):
        drawn = inputs[side]
        values = leaf if averaged else leaf - drawn["reference"].double()
        sums = torch.stack([values[drawn["mask"] & (drawn["rows"] == row)].sum() for row in range(inputs["pairs"])])
        count = torch.stack([(drawn["mask"] & (drawn["rows"] == row)).sum() for row in range(inputs["pairs"])])
        sides.append(sums / count if averaged else sums)
    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    losses, _, _ = CPOTrainer.cpo_loss(SimpleNamespace(**defaults | options), *sides)
    return results(losses.mean(), leaves)


# --- float64, pair by pair -------------------------------------------------------------------------------------------


def loops(pair: Callable[[list[float], list[int]], tuple[float, list[float]]], inputs: dict) -> Tensors:
    """pair: from the two summed log-ratios and lengths, the loss and its derivatives by the two sums."""
    total, found = 0.0, [torch.zeros(len(inputs[side]["rows"]), dtype=torch.float64) for side in SIDES]
    for row in range(inputs["pairs"]):
        here = [inputs[side]["mask"] & (inputs[side]["rows"] == row) for side in SIDES]
        ratios = [
            math.fsum((inputs[side]["policy"].double() - inputs[side]["reference"].double())[mask].tolist())
            for side, mask in zip(SIDES, here, strict=True)
        ]
        loss, slopes = pair(ratios, [int(mask.sum()) for mask in here])
        total += loss / inputs["pairs"]
        for gradient, mask, slope in zip(found, here, slopes, strict=True):
            gradient[mask] = slope / inputs["pairs"]
    result = {"loss": torch.tensor(total, dtype=torch.float64)}
    return result | {f"grad {side}": gradient for side, gradient in zip(SIDES, found, strict=True)}


def smoothed(beta: float, smoothing: float, ratios: list[float], lengths: list[int]) -> tuple[float, list[float]]:
    p = 1 / (1 + math.exp(-beta * (ratios[0] - ratios[1])))
    slope = beta * (p - (1 - smoothing))
    return -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p), [slope, -slope]


def averaged(beta: float, ratios: list[float], lengths: list[int]) -> tuple[float, list[float]]:
    short = ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / (2 * beta)
    return short**2, [2 * short / lengths[0], -2 * short / lengths[1]]


def _case(what: str, oracle: str, name: str, theirs: Callable, reference: bool = True, **options: Any) -> Case:
    return Case(f"preferences/{what}", oracle, draw, partial(ours, name, options, reference), theirs)


_DPO, _CPO = f"{TRL} DPOTrainer._compute_loss", f"{TRL} CPOTrainer.cpo_loss"

CASES = [
    _case("dpo", _DPO, "dpo", partial(trl_dpo, "sigmoid", 0.1)),
    _case("dpo (beta 0.5)", _DPO, "dpo", partial(trl_dpo, "sigmoid", 0.5), beta=0.5),
    _case("ipo (averaged)", _DPO, "ipo", partial(trl_dpo, "ipo", 0.1)),
    _case("ipo (averaged), loops", LOOPS, "ipo", partial(loops, partial(averaged, 0.2)), beta=0.2),
    _case(
        "ipo (summed)",
        _CPO,
        "ipo",
        partial(trl_cpo, {"loss_type": "ipo", "beta": 0.2}, False),
        beta=0.2,
        length_averaged=False,
    ),
    _case("cdpo", _CPO, "cdpo", partial(trl_cpo, {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1}, False)),
    _case("cdpo, loops", LOOPS, "cdpo", partial(loops, partial(smoothed, 0.3, 0.2)), beta=0.3, label_smoothing=0.2),
    _case(
        "simpo",
        _CPO,
        "simpo",
        partial(trl_cpo, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}, True),
        reference=False,
    ),
    _case(
        "simpo (beta 5, gamma 0.5)",
        _CPO,
        "simpo",
        partial(trl_cpo, {"loss_type": "simpo", "beta": 5.0, "simpo_gamma": 0.5}, True),
        reference=False,
        beta=5.0,
        gamma=0.5,
    ),
]
