"""Rollout corrections: nothing to correct, what each leaves out, whole rows, order, and configurations refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tokens import pick_rows, random_rows

from rlsys.algorithms.corrections import CORRECTIONS, Correction, apply_corrections, check_corrections
from rlsys.config.errors import UserError

OPTIONS: dict[str, dict[str, Any]] = {
    "tis_token": {"cap": 1.1}, "tis_sequence": {"cap": 1.3}, "icepop": {"low": 0.8, "high": 1.2},
    "sequence_mask": {"low": 0.9, "high": 1.1}, "reject": {"threshold": 0.05}, "veto": {"low": 0.7},
}  # fmt: skip
every_correction = pytest.mark.parametrize("name", OPTIONS)


def correct(batch: dict[str, Any], corrections: dict[str, dict[str, Any]]) -> Correction:
    columns = (batch[name] for name in ("old_logprobs", "rollout_logprobs", "mask", "rows", "num_rows"))
    return apply_corrections(corrections, *columns)


def ratios(values: list[list[float]], **corrections: dict[str, Any]) -> Correction:
    """Rows with these ratios π_old/μ."""
    flat = torch.tensor([math.log(r) for row in values for r in row], dtype=torch.float64)
    rows = torch.arange(len(values)).repeat_interleave(torch.tensor([len(row) for row in values]))
    mask = torch.ones(len(flat), dtype=torch.bool)
    return apply_corrections(corrections, flat - 1, torch.full_like(flat, -1.0), mask, rows, len(values))


def test_every_correction_is_listed_here() -> None:
    assert set(CORRECTIONS.names()) == set(OPTIONS)


@every_correction
def test_where_sampler_and_trainer_agree_there_is_nothing_to_correct(name: str) -> None:
    batch = random_rows(0)
    batch["rollout_logprobs"] = batch["old_logprobs"]
    found = correct(batch, {name: OPTIONS[name]})
    assert torch.equal(found.weights, batch["mask"].double())
    assert torch.equal(found.keep, batch["mask"])


@every_correction
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 200), order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_order_and_cut_of_rows_change_nothing(name: str, seed: int, order: list[int], cut: int) -> None:
    batch = random_rows(seed)
    whole = correct(batch, {name: OPTIONS[name]})
    totals = dict.fromkeys(whole.sums, (0.0, 0))
    for rows in (order[:cut], order[cut:]):
        part, where = pick_rows(batch, rows)
        found = correct(part, {name: OPTIONS[name]})
        torch.testing.assert_close(found.weights, whole.weights[where].to(found.weights.dtype))
        assert torch.equal(found.keep, whole.keep[where])
        totals = {k: (s + float(found.sums[k][0]), n + int(found.sums[k][1])) for k, (s, n) in totals.items()}
    for key, (total, count) in whole.sums.items():
        assert totals[key] == (pytest.approx(float(total)), int(count))


@every_correction
def test_nothing_leaks_through_the_mask_and_no_gradient_comes_out(name: str) -> None:
    batch = random_rows(4)
    clean = correct(batch, {name: OPTIONS[name]})
    old = torch.where(batch["mask"], batch["old_logprobs"], torch.inf).requires_grad_()
    sampler = torch.where(batch["mask"], batch["rollout_logprobs"], torch.nan)
    found = correct(batch | {"old_logprobs": old, "rollout_logprobs": sampler}, {name: OPTIONS[name]})
    assert torch.equal(found.weights, clean.weights)
    assert torch.equal(found.keep, clean.keep)
    assert not found.weights.requires_grad
    assert not found.weights[~batch["mask"]].any()
    assert not found.keep[~batch["mask"]].any()


def test_weights_by_token_and_by_sequence() -> None:
    rows = [[0.5, 3.0], [1.5]]
    token = ratios(rows, tis_token={"cap": 2.0})
    assert token.weights.tolist() == pytest.approx([0.5, 2.0, 1.5])
    assert [float(x) for x in token.sums["tis_token_weight"]] == pytest.approx([4.0, 3.0])
    assert [int(x) for x in token.sums["tis_token_capped"]] == [1, 3]
    assert ratios(rows, tis_sequence={"cap": 1.4}).weights.tolist() == pytest.approx([1.4, 1.4, 1.4])
    assert ratios([[0.5, 3.0, 0.5]], tis_sequence={}).weights.tolist() == pytest.approx([0.75] * 3)
    window = ratios([[0.4, 0.6, 4.0, 6.0]], icepop={})
    assert window.weights.tolist() == pytest.approx([0.0, 0.6, 4.0, 0.0])
    assert window.keep.all()
    assert int(window.sums["icepop_outside"][0]) == 2


def test_rows_are_left_out_whole() -> None:
    rows = [[1.0, 1.0], [0.4, 2.5], [1.4, 1.4], [1e-5, 1.0]]

    def kept(**corrections: dict[str, Any]) -> list[bool]:
        found = ratios(rows, **corrections)
        first, second = found.keep[0::2].tolist(), found.keep[1::2].tolist()
        assert first == second
        return first

    bounds = {"low": 0.5, "high": 1.5}
    assert kept(sequence_mask=bounds) == [True, True, True, False]
    assert kept(sequence_mask=bounds | {"ratio": "product"}) == [True, True, False, False]
    assert kept(sequence_mask=bounds | {"ratio": "worst"}) == [True, False, True, False]
    assert kept(veto={}) == [True, True, True, False]
    assert kept(veto={"low": 0.5}) == [True, False, True, False]
    k1 = {"threshold": math.log(1.45), "estimator": "k1"}
    assert kept(reject=k1) == [True, True, True, False]
    assert kept(reject=k1 | {"over": "row_sum"}) == [
        True,
        True,
        False,
        False,
    ]
    assert kept(reject=k1 | {"over": "row_max"}) == [
        True,
        False,
        True,
        False,
    ]
    found = ratios([[1.0, 1.0], [0.4, 2.5]], veto={"low": 0.5})
    assert [int(x) for x in found.sums["veto_rows_kept"]] == [1, 2]
    assert [int(x) for x in found.sums["veto_kept"]] == [2, 4]


def test_rejection_by_token_keeps_the_rest_of_the_row() -> None:
    found = ratios([[1.0, 3.0, 0.9]], reject={"threshold": 0.1, "over": "token", "estimator": "k2"})
    assert found.keep.tolist() == [True, False, True]


@pytest.mark.parametrize("seed", range(5))
def test_several_multiply_weights_and_agree_on_what_is_kept(seed: int) -> None:
    batch = random_rows(seed)
    names = ("tis_token", "sequence_mask", "veto")
    together = correct(batch, {name: OPTIONS[name] for name in names})
    alone = [correct(batch, {name: OPTIONS[name]}) for name in names]
    torch.testing.assert_close(together.weights, alone[0].weights)
    assert torch.equal(together.keep, alone[0].keep & alone[1].keep & alone[2].keep)
    assert together.sums.keys() == alone[0].sums.keys() | alone[1].sums.keys() | alone[2].sums.keys()
    nothing = correct(batch, {})
    assert torch.equal(nothing.weights, batch["mask"].double())
    assert torch.equal(nothing.keep, batch["mask"])


def test_shapes_that_disagree_are_refused() -> None:
    batch = random_rows(0)
    with pytest.raises(ValueError, match=rf"\({len(batch['rows'])},\).*\(1,\)"):
        correct(batch | {"rollout_logprobs": batch["rollout_logprobs"][:1]}, {"tis_token": {}})


@pytest.mark.parametrize(
    ("corrections", "key", "words"),
    [
        ({"tis_tokens": {}}, ".tis_tokens", "did you mean 'tis_token'"),
        ({"tis_token": {"ca": 2.0}}, ".tis_token.ca", "unknown option"),
        ({"tis_token": {"cap": 0.0}}, ".tis_token.cap", "more than 0"),
        ({"tis_token": {"cap": "2"}}, ".tis_token.cap", "valid number"),
        ({"icepop": {"low": 1.5}}, ".icepop.low", "ratio 1"),
        ({"sequence_mask": {"high": 0.9}}, ".sequence_mask.high", "ratio 1"),
        ({"reject": {}}, ".reject.threshold", "needs the option"),
        ({"reject": {"threshold": -1.0}}, ".reject.threshold", "more than 0"),
        ({"reject": {"threshold": 1.0, "over": "rows"}}, ".reject.over", "row_mean"),
        ({"veto": {"low": 1e-12}}, ".veto.low", "cannot be found"),
        ({"tis_token": {}, "icepop": {}}, "", "count it twice"),
    ],
)
def test_bad_configurations_are_refused(corrections: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_corrections(corrections, bypass=False)
    assert caught.value.where == f"algorithm.correction{key}"


@every_correction
def test_a_correction_that_cannot_do_anything_is_refused(name: str) -> None:
    check_corrections({name: OPTIONS[name]}, bypass=False)
    with pytest.raises(UserError, match="no effect"):
        check_corrections({name: OPTIONS[name]}, bypass=True)
    check_corrections({}, bypass=True)
