"""A step with every channel does not depend on how the batch is ordered, cut, packed or padded, and is exactly zero
where it must be."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_tokens import on_ranks

from rlsys.algorithms.channels import CrossEntropy, Distillation, PolicyGradient, Preference, ValueLoss
from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence
from rlsys.algorithms.losses import POLICY_LOSSES, prepare_of
from rlsys.algorithms.objective import (
    Channel,
    DivergencePass,
    ForwardOutput,
    Objective,
    ObjectiveSums,
    ResponseBatch,
    TeacherOutput,
)
from rlsys.config.plugins import reads_of

DOUBLE = torch.float64
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
COVARIANCE = {"cov_ratio": 0.5, "cov_low": -9.0, "cov_high": 9.0}
SPEC = DivergencePass("jsd")
LEAVES = ("logprobs", "entropy", "divergence", "chosen", "rejected", "values")

LOSSES = sorted(POLICY_LOSSES.names())

Batch = tuple[ResponseBatch, dict[str, torch.Tensor]]


def every_channel(aggregation: Any = "token-mean", **policy: Any) -> dict[str, tuple[Channel, float]]:
    taught = "seq-mean-token-mean" if aggregation == "seq-mean-token-mean" else "token-mean"
    terms = {"kl_coef": 0.1, "kl_corrected": True, "entropy_coef": 0.01, "entropy_quantile": 0.3, "functional": True}
    corrections = {"tis_token": {"cap": 2.0}, "veto": {"low": 0.1}}
    policy = {"aggregation": aggregation, "horizon": 9, "correction": corrections, **terms, **policy}
    return {
        "policy": (PolicyGradient(**policy), 1.0),
        "distillation": (Distillation(SPEC, ratio_cap=1.2, aggregation=taught, mismatch=True), 0.5),
        "preference": (Preference("dpo", {"beta": 0.3}), 0.7),
        "imitation": (CrossEntropy(), 0.2),
        "critic": (ValueLoss(clip=0.2), 0.4),
    }


def random_batch(seed: int, lengths: list[int]) -> Batch:
    """Rows with responses of these lengths (0: pairs alone), their columns, and what the forward pass gave."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(size, generator=generator, dtype=DOUBLE)

    def chance(size: int, share: float) -> torch.Tensor:
        return torch.rand(size, generator=generator) < share

    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens, mask = len(rows), chance(len(rows), 0.8)
    old = -3 * torch.rand(tokens, generator=generator, dtype=DOUBLE)
    columns = {
        "response_mask": mask,
        "functional_mask": chance(tokens, 0.7),
        "teacher_mask": mask & chance(tokens, 0.6),
        "advantages": normal(len(lengths))[rows],
        "old_logprobs": old,
        "old_entropy": normal(tokens).abs(),
        "ref_logprobs": old + normal(tokens, 0.3),
        "rollout_logprobs": old + normal(tokens, 0.2),
        "values": normal(tokens),
        "returns": normal(tokens),
        "pair_slot": chance(len(lengths), 0.7),
    }
    leaves = {
        "logprobs": old + normal(tokens, 0.4),
        "entropy": normal(tokens).abs(),
        "divergence": normal(tokens).abs(),
        "values": normal(tokens),
    }
    pairs = {}
    has_pair = columns["pair_slot"] & chance(len(lengths), 0.8)
    for side in ("chosen", "rejected"):
        counts = torch.where(has_pair, torch.randint(1, 6, (len(lengths),), generator=generator), 0)
        pairs[side] = torch.arange(len(lengths)).repeat_interleave(counts)
        columns[f"{side}_mask"] = chance(len(pairs[side]), 0.8)
        columns[f"{side}_ref_logprobs"] = -normal(len(pairs[side])).abs()
        leaves[side] = -normal(len(pairs[side])).abs()
    return ResponseBatch(columns, rows, len(lengths), pairs), leaves


def picked(batch: Batch, order: list[int]) -> tuple[Batch, dict[str, torch.Tensor]]:
    """These rows, in this order; and where their tokens lie in the batch, by kind."""
    rows = {"response": batch[0].rows, **batch[0].pair_rows}
    where = {kind: torch.cat([torch.zeros(0).long(), *((r == row).nonzero()[:, 0] for row in order)])
             for kind, r in rows.items()}  # fmt: skip
    new = {kind: torch.tensor([order.index(int(row)) for row in r[where[kind]]], dtype=torch.int64)
           for kind, r in rows.items()}  # fmt: skip
    columns = {
        name: column[torch.tensor(order, dtype=torch.int64)] if name == "pair_slot" else column[where[kind_of(name)]]
        for name, column in batch[0].columns.items()
    }
    leaves = {name: leaf[where[kind_of(name)]] for name, leaf in batch[1].items()}
    pairs = {side: new[side] for side in ("chosen", "rejected")}
    return (ResponseBatch(columns, new["response"], len(order), pairs), leaves), where


def kind_of(name: str) -> str:
    return next((side for side in ("chosen", "rejected") if name.startswith(side)), "response")


def forward_output(leaves: dict[str, torch.Tensor]) -> ForwardOutput:
    pairs = {side: leaves[side] for side in ("chosen", "rejected")}
    fixed = leaves["logprobs"].detach()
    teacher = TeacherOutput(leaves["divergence"], fixed - 0.5, leaves["entropy"].detach())
    return ForwardOutput(leaves["logprobs"], leaves["entropy"], pairs, teacher, leaves["values"])


def gradients(loss: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, [leaves[name] for name in LEAVES], allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(LEAVES, found, strict=True)}


def with_gradient(batch: Batch) -> Batch:
    return batch[0], {name: leaf.clone().requires_grad_() for name, leaf in batch[1].items()}


def step(objective: Objective, batch: Batch) -> tuple[ObjectiveSums, dict[str, torch.Tensor]]:
    batch = with_gradient(batch)
    result = objective.loss(batch[0], forward_output(batch[1]), objective.prepare(batch[0]))
    return result, gradients(result.loss, batch[1])


def check_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@given(st.integers(0, 10_000), lengths_of_rows, st.sampled_from(AGGREGATIONS), st.data())
def test_cut_and_order_of_the_rows_do_not_matter(
    seed: int, lengths: list[int], aggregation: str, data: st.DataObject
) -> None:
    batch = random_batch(seed, lengths)
    objective = Objective(every_channel(aggregation))
    whole, expected = step(objective, batch)
    order = data.draw(st.permutations(range(len(lengths))))
    borders = [0, *sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3))), len(lengths)]
    shuffled, _ = picked(batch, list(order))
    shuffled = with_gradient(shuffled)
    prepared = objective.prepare(shuffled[0])
    loss, pieces = torch.zeros((), dtype=DOUBLE), []
    for start, stop in itertools.pairwise(borders):
        piece, where = picked(shuffled, list(range(start, stop)))
        pieces.append(objective.loss(piece[0], forward_output(piece[1]), prepared, where["response"]))
        loss = loss + pieces[-1].loss
    check_close(loss, whole.loss)
    _, there = picked(batch, list(order))
    for name, gradient in gradients(loss, shuffled[1]).items():
        check_close(gradient, expected[name][there[kind_of(name)]])
    for name, total in whole.totals.items():
        check_close(sum(piece.totals[name].double() for piece in pieces), total.double())
    for name, (value, count) in whole.sums.items():
        check_close(sum(piece.sums[name][0].double() for piece in pieces), value.double())
        assert sum(int(piece.sums[name][1]) for piece in pieces) == int(count)


@given(st.integers(0, 10_000), lengths_of_rows, st.integers(1, 4), st.data())
def test_ranks_share_the_normalisers(seed: int, lengths: list[int], ranks: int, data: st.DataObject) -> None:
    """Rows are dealt out in any way; some ranks may have none."""
    batch = random_batch(seed, lengths)
    home = data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(lengths), max_size=len(lengths)))
    objective = Objective(every_channel(loss_name="clip_cov", loss_options=COVARIANCE))
    whole, expected = step(objective, batch)

    def work(rank: int, collective: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        mine, where = picked(batch, [row for row in range(len(lengths)) if home[row] == rank])
        mine = with_gradient(mine)
        result = objective.loss(mine[0], forward_output(mine[1]), objective.prepare(mine[0], collective))
        return result.loss.item(), gradients(result.loss, mine[1]), where

    found = on_ranks(ranks, work)
    assert sum(loss for loss, _, _ in found) == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    for _, mine, where in found:
        for name, gradient in mine.items():
            check_close(gradient, expected[name][where[kind_of(name)]])


@given(st.integers(0, 10_000), lengths_of_rows, st.integers(1, 4), st.sampled_from(AGGREGATIONS))
def test_padding_changes_nothing_whatever_it_holds(
    seed: int, lengths: list[int], padding: int, aggregation: str
) -> None:
    """Every row gets tokens behind its own, off every mask, that hold NaN and infinities."""
    batch = random_batch(seed, lengths)
    objective = Objective(every_channel(aggregation, entropy_quantile=0.0))
    whole, expected = step(objective, batch)
    (flat, leaves), rubbish = batch, itertools.cycle([math.nan, math.inf, -math.inf])
    places: dict[str, torch.Tensor] = {}
    kinds = {"response": flat.rows, **flat.pair_rows}
    rows = {}
    for kind, r in kinds.items():
        counts = torch.bincount(r, minlength=flat.num_rows)
        added = torch.where(counts > 0, padding, 0)
        rows[kind] = torch.arange(flat.num_rows).repeat_interleave(counts + added)
        start = (counts + added).cumsum(0) - counts - added
        places[kind] = start[r] + torch.arange(len(r)) - (counts.cumsum(0) - counts)[r]

    def padded(name: str, values: torch.Tensor) -> torch.Tensor:
        kind = kind_of(name)
        if values.dtype == torch.bool:
            return torch.zeros(len(rows[kind]), dtype=torch.bool).index_put((places[kind],), values)
        blank = torch.tensor([next(rubbish) for _ in rows[kind]], dtype=values.dtype)
        return blank.index_put((places[kind],), values)

    columns = {name: c if name == "pair_slot" else padded(name, c) for name, c in flat.columns.items()}
    wide = ResponseBatch(columns, rows["response"], flat.num_rows, {s: rows[s] for s in ("chosen", "rejected")})
    result, found = step(objective, (wide, {name: padded(name, leaf) for name, leaf in leaves.items()}))
    check_close(result.loss, whole.loss)
    for name, gradient in found.items():
        kind = kind_of(name)
        check_close(gradient[places[kind]], expected[name])
        off = torch.ones(len(rows[kind]), dtype=torch.bool).index_fill(0, places[kind], False)
        assert (gradient[off] == 0).all(), name
    for name, total in whole.totals.items():
        check_close(result.totals[name], total)


@given(st.integers(0, 10_000), lengths_of_rows, st.sampled_from(LOSSES))
def test_masked_tokens_have_exactly_no_gradient_whatever_they_hold(seed: int, lengths: list[int], loss: str) -> None:
    flat, leaves = random_batch(seed, lengths)
    aggregation = "seq-mean-token-mean" if loss in ("gspo", "gmpo") else "token-mean"
    objective = Objective(every_channel(aggregation, loss_name=loss, entropy_quantile=0.0))
    off = {
        "response": ~flat.columns["response_mask"],
        **{side: ~flat.columns[f"{side}_mask"] for side in ("chosen", "rejected")},
    }
    expected = step(objective, (flat, leaves))

    def spoilt(name: str, values: torch.Tensor) -> torch.Tensor:
        if values.dtype == torch.bool:
            return values
        return torch.where(off[kind_of(name)], math.nan, values)

    columns = {name: c if name == "pair_slot" else spoilt(name, c) for name, c in flat.columns.items()}
    batch = ResponseBatch(columns, flat.rows, flat.num_rows, flat.pair_rows)
    result, found = step(objective, (batch, {name: spoilt(name, leaf) for name, leaf in leaves.items()}))
    assert torch.equal(result.loss, expected[0].loss)
    for name, gradient in found.items():
        assert (gradient[off[kind_of(name)]] == 0).all(), name
        assert torch.equal(gradient, expected[1][name]), name


# Without the terms that advantages do not enter; kl_cov's cannot be switched off.
OWN_TERMS: dict[str, dict[str, Any]] = {"dppo_tv": {"kl_tau": 0.0}}


@given(st.integers(0, 10_000), lengths_of_rows, st.sampled_from([name for name in LOSSES if name != "kl_cov"]))
def test_without_advantages_the_policy_loss_and_its_gradient_are_zero(seed: int, lengths: list[int], loss: str) -> None:
    flat, leaves = random_batch(seed, lengths)
    flat.columns["advantages"].zero_()
    channel = PolicyGradient(loss_name=loss, loss_options=OWN_TERMS.get(loss, {}))
    result, found = step(Objective({"policy": (channel, 1.0)}), (flat, leaves))
    assert result.loss == 0
    assert (found["logprobs"] == 0).all()


def heads(seed: int, same: bool) -> tuple[torch.Tensor, Head, TeacherPart]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*size, generator=generator, dtype=DOUBLE) for size in ((5, 4), (11, 4)))
    other = hidden if same else hidden + torch.randn(5, 4, generator=generator, dtype=DOUBLE)
    head = Head(weight, None)
    return hidden.clone().requires_grad_(), head, TeacherPart(1.0, other.clone(), head)


DIVERGENCES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {}),
    ("jsd", {"alpha": 0.1}),
]


@given(st.integers(0, 10_000), st.sampled_from(DIVERGENCES), st.sampled_from([None, 3]), st.booleans())
def test_identical_distributions_have_no_divergence_and_no_gradient(
    seed: int, divergence: tuple[str, dict[str, Any]], top_k: int | None, tail: bool
) -> None:
    hidden, head, teacher = heads(seed, same=True)
    name, options = divergence
    found = token_divergence(hidden, head, [teacher], name, options, top_k=top_k, tail=tail)
    assert found.loss.tolist() == [0.0] * 5
    (gradient,) = torch.autograd.grad(found.loss.sum(), hidden)
    assert (gradient == 0).all()


@given(st.integers(0, 10_000))
def test_taid_at_its_start_does_not_look_at_the_teacher(seed: int) -> None:
    hidden, head, teacher = heads(seed, same=False)
    _, _, same = heads(seed, same=True)
    results = []
    for part in (teacher, same):
        loss = token_divergence(hidden, head, [part], "taid", {}, t=0.0).loss
        results.append((loss, torch.autograd.grad(loss.sum(), hidden)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] == 0).all()
    later = token_divergence(hidden, head, [teacher], "taid", {}, t=0.5).loss
    assert not torch.equal(later, results[0][0])


# By loss: options, and the log-ratios beyond which an advantage of either sign earns nothing more.
CLIPPED: dict[str, tuple[dict[str, Any], float, float]] = {
    "ppo_clip": ({}, math.log(1.2), math.log(0.8)),
    "dapo": ({}, math.log(1.28), math.log(0.8)),
    "decoupled_ppo": ({}, math.log(1.2), math.log(0.8)),
    "gspo": ({"clip_low": 0.1, "clip_high": 0.1}, math.log(1.1), math.log(0.9)),
    "gmpo": ({}, 0.4, -0.4),
}


@given(st.sampled_from(sorted(CLIPPED)), st.booleans(), st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5))
def test_clipped_tokens_have_exactly_no_gradient(loss: str, good: bool, beyond: list[float]) -> None:
    options, high, low = CLIPPED[loss]
    function, count = POLICY_LOSSES.get(loss, where="algorithm.loss"), len(beyond)
    old = torch.full((count,), -4.0, dtype=DOUBLE)
    shift = torch.tensor([high + b if good else low - b for b in beyond], dtype=DOUBLE)
    logprobs = (old + shift).requires_grad_()
    advantages = torch.full((count,), 1.0 if good else -1.0, dtype=DOUBLE)
    known: dict[str, Any] = {"rows": torch.zeros(count).long(), "num_rows": 1, "rollout_logprobs": old}
    extras = {name: known[name] for name in reads_of(function)}
    assert prepare_of(function) is None
    tokens = function(logprobs, old, advantages, torch.ones(count, dtype=torch.bool), **extras, **options).tokens
    (gradient,) = torch.autograd.grad(tokens.sum(), logprobs, allow_unused=True)
    assert gradient is None or (gradient == 0).all()
