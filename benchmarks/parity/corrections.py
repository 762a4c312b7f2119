"""Rollout corrections against verl's ``rollout_corr_helper``, and against loops where it has no such rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from benchmarks.parity.tokens import padded, ragged
from rlsys.algorithms.corrections import apply_corrections


def ours(corrections: dict[str, dict[str, Any]], inputs: dict[str, Any]) -> Tensors:
    """Weights of the kept tokens, and what is kept, padded."""
    found = apply_corrections(
        corrections,
        inputs["old_logprobs"],
        inputs["rollout_logprobs"],
        inputs["mask"],
        inputs["rows"],
        inputs["num_rows"],
    )
    return {"weights": padded(found.weights, inputs), "keep": padded(found.keep, inputs)}


def verl(options: dict[str, Any], inputs: dict[str, Any]) -> Tensors:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    old, rollout = padded(inputs["old_logprobs"], inputs), padded(inputs["rollout_logprobs"], inputs)
    mask = padded(inputs["mask"].float(), inputs)
    found, keep, _ = compute_rollout_correction_and_rejection_mask(old, rollout, mask, **options)
    return {"weights": mask if found is None else found.batch["rollout_is_weights"], "keep": keep}


def loops(row_keeps: Callable[[list[float]], bool], inputs: dict[str, Any]) -> Tensors:
    """Rows that a rule on the ratios of their tokens keeps."""
    old, rollout = inputs["old_logprobs"].double(), inputs["rollout_logprobs"].double()
    keep = torch.zeros(inputs["num_rows"], dtype=torch.bool)
    for row in range(inputs["num_rows"]):
        live = (inputs["mask"] & (inputs["rows"] == row)).nonzero().flatten().tolist()
        keep[row] = row_keeps([math.exp(old[i] - rollout[i]) for i in live])
    mask = inputs["mask"]
    return {"weights": padded(mask.double(), inputs), "keep": padded(keep[inputs["rows"]] & mask, inputs)}


def against_verl(what: str, corrections: dict[str, dict[str, Any]], theirs: dict[str, Any]) -> Case:
    return Case(
        f"corrections/{what}",
        "verl 0.9.1 rollout_corr_helper.compute_rollout_correction_and_rejection_mask",
        ragged,
        partial(ours, corrections),
        partial(verl, theirs),
    )


def against_loops(what: str, corrections: dict[str, dict[str, Any]], keeps: Callable[[list[float]], bool]) -> Case:
    return Case(f"corrections/{what}", "float64 reference", ragged, partial(ours, corrections), partial(loops, keeps))


def rejection(estimator: str, over: str, threshold: float) -> Case:
    """verl writes k1's bound as a ratio: exp(threshold), and its reciprocal."""
    bound = math.exp(threshold) if estimator == "k1" else threshold
    verl_name = f"{over.replace('row', 'seq')}_{estimator}"
    options = {"threshold": threshold, "estimator": estimator, "over": over}
    return against_verl(
        f"reject {over} {estimator}",
        {"reject": options},
        {"rollout_rs": verl_name, "rollout_rs_threshold": f"{1 / bound!r}_{bound!r}" if estimator == "k1" else bound},
    )


CASES = [
    against_verl("tis_token", {"tis_token": {"cap": 1.3}}, {"rollout_is": "token", "rollout_is_threshold": 1.3}),
    against_verl(
        "tis_sequence", {"tis_sequence": {"cap": 1.7}}, {"rollout_is": "sequence", "rollout_is_threshold": 1.7}
    ),
    against_verl(
        "icepop",
        {"icepop": {"low": 0.6, "high": 1.5}},
        {"rollout_is": "token", "rollout_is_threshold": "0.6_1.5"},
    ),
    against_verl(
        "sequence_mask geometric",
        {"sequence_mask": {"low": 0.8, "high": 1.1}},
        {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": f"{1 / 1.1!r}_{1 / 0.8!r}"},
    ),
    against_verl(
        "sequence_mask product",
        {"sequence_mask": {"low": 0.3, "high": 2.5, "ratio": "product"}},
        {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": f"{1 / 2.5!r}_{1 / 0.3!r}"},
    ),
    against_loops(
        "sequence_mask worst",
        {"sequence_mask": {"low": 0.4, "high": 2.0, "ratio": "worst"}},
        lambda ratios: min(ratios) >= 0.4 and max(ratios) <= 2.0,
    ),
    against_loops("veto", {"veto": {"low": 0.4}}, lambda ratios: min(ratios) >= 0.4),
    rejection("k1", "token", 0.4),
    rejection("k2", "token", 0.1),
    rejection("k3", "token", 0.1),
    rejection("k1", "row_mean", 0.1),
    rejection("k2", "row_mean", 0.1),
    rejection("k3", "row_mean", 0.1),
    rejection("k1", "row_sum", 0.8),
    rejection("k2", "row_sum", 0.8),
    rejection("k3", "row_sum", 0.8),
    rejection("k2", "row_max", 0.4),
    rejection("k3", "row_max", 0.4),
    against_loops(
        "reject row_max k1",
        {"reject": {"threshold": 0.8, "estimator": "k1", "over": "row_max"}},
        lambda ratios: max(abs(math.log(ratio)) for ratio in ratios) <= 0.8,
    ),
    against_verl(
        "tis_sequence + reject row_max k3",
        {"tis_sequence": {"cap": 1.7}, "reject": {"threshold": 0.4, "over": "row_max"}},
        {
            "rollout_is": "sequence",
            "rollout_is_threshold": 1.7,
            "rollout_rs": "seq_max_k3",
            "rollout_rs_threshold": 0.4,
        },
    ),
]
