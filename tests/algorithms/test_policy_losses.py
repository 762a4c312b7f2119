"""What holds of every policy loss: zeros, independence of order and cut, nothing through the mask, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tokens import on_ranks, pick_rows, random_rows

from rlsys.algorithms.aggregation import normaliser, token_weights
from rlsys.algorithms.collective import Alone
from rlsys.algorithms.losses import (
    POLICY_LOSSES,
    PolicyLoss,
    aggregation_of,
    check_loss,
    prepare_of,
)
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads_of

LOSSES = {
    "ppo_clip": {"dual_clip": 2.0}, "dapo": {}, "gspo": {"clip_low": 0.1, "clip_high": 0.1}, "gmpo": {}, "cispo": {},
    "sapo": {}, "gpg": {}, "dppo_tv": {"mask_low": 0.05, "mask_high": 0.05, "kl_tau": 0.1}, "decoupled_ppo": {},
    "clip_cov": {"cov_ratio": 0.1, "cov_low": 0.1}, "kl_cov": {"cov_ratio": 0.1},
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)


def prepared(name: str, batch: dict[str, Any], collective: Any = None) -> dict[str, torch.Tensor]:
    prepare = prepare_of(POLICY_LOSSES.get(name, where=""))
    if prepare is None:
        return {}
    return prepare(batch["old_logprobs"], batch["advantages"], batch["mask"], collective or Alone(), **LOSSES[name])


def evaluate(name: str, batch: dict[str, Any], extra: dict[str, torch.Tensor] | None = None) -> PolicyLoss:
    function = POLICY_LOSSES.get(name, where="")
    known = batch | {"prepared": prepared(name, batch) if extra is None else extra}
    wanted = {read: known[read] for read in reads_of(function)}
    columns = [batch[column] for column in ("logprobs", "old_logprobs", "advantages", "mask")]
    return function(*columns, **wanted, **LOSSES[name])


def aggregate(found: PolicyLoss, batch: dict[str, Any]) -> torch.Tensor:
    """Σ weight · loss under the sequence mean, not divided by anything."""
    weights = token_weights("seq-mean-token-mean", batch["mask"], batch["rows"], batch["num_rows"])
    return (found.tokens * weights).sum()


def gradient(name: str, batch: dict[str, Any], extra: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    logprobs = batch["logprobs"].clone().requires_grad_()
    batch = batch | {"logprobs": logprobs}
    return torch.autograd.grad(aggregate(evaluate(name, batch, extra), batch), logprobs)[0]


def test_every_loss_is_listed_here() -> None:
    assert set(POLICY_LOSSES.names()) == set(LOSSES)


@every_loss
def test_nothing_leaks_through_the_mask(name: str) -> None:
    batch = random_rows(0)
    clean, clean_gradient = evaluate(name, batch), gradient(name, batch)
    dirty = dict(batch)
    for i, column in enumerate(("logprobs", "old_logprobs", "rollout_logprobs", "advantages")):
        filler = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
        noise = filler[(torch.arange(len(batch["rows"])) + i) % 3]
        dirty[column] = torch.where(batch["mask"], batch[column], noise)
    found = evaluate(name, dirty)
    assert (found.tokens[~batch["mask"]] == 0).all()
    assert torch.equal(found.tokens, clean.tokens)
    assert (gradient(name, dirty)[~batch["mask"]] == 0).all()
    assert torch.equal(gradient(name, dirty), clean_gradient)
    assert {key: float(value) for key, (value, _) in found.sums.items()} == {
        key: float(value) for key, (value, _) in clean.sums.items()
    }


@every_loss
def test_no_advantage_no_gradient(name: str) -> None:
    batch = random_rows(1)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    # the two with a pull towards a policy have none where they are at it
    batch["rollout_logprobs"] = batch["old_logprobs"] = batch["logprobs"].clone()
    assert not evaluate(name, batch).tokens.any()
    assert not gradient(name, batch).any()


@every_loss
def test_at_the_sampling_policy_it_is_the_policy_gradient(name: str) -> None:
    batch = random_rows(2)
    batch["rollout_logprobs"] = batch["old_logprobs"] = batch["logprobs"].clone()
    weights = token_weights("seq-mean-token-mean", batch["mask"], batch["rows"], batch["num_rows"])
    expected = -batch["advantages"] * weights
    expected[prepared(name, batch).get("detached", torch.zeros_like(batch["mask"]))] = 0
    torch.testing.assert_close(gradient(name, batch), expected)


@every_loss
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100), cuts=st.lists(st.integers(0, 6), max_size=3), shuffle=st.permutations(range(6)))
def test_order_and_cut_of_rows_change_nothing(name: str, seed: int, cuts: list[int], shuffle: list[int]) -> None:
    batch = random_rows(seed)
    whole, whole_gradient = evaluate(name, batch), gradient(name, batch)
    extra = prepared(name, batch)
    borders = [0, *sorted(cuts), 6]
    collected = torch.full_like(whole_gradient, torch.nan)
    sums = dict.fromkeys(whole.sums, (0.0, 0))
    for start, stop in itertools.pairwise(borders):
        part, where = pick_rows(batch, shuffle[start:stop])
        own = {key: values[where] for key, values in extra.items()}
        collected[where] = gradient(name, part, own)
        found = evaluate(name, part, own)
        assert found.sums.keys() == sums.keys()
        sums = {k: (s + float(found.sums[k][0]), n + int(found.sums[k][1])) for k, (s, n) in sums.items()}
    torch.testing.assert_close(collected, whole_gradient)
    for key, (total, count) in whole.sums.items():
        assert sums[key] == (pytest.approx(float(total), abs=1e-9), int(count))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_what_is_prepared_is_the_same_on_any_ranks(name: str, ranks: int) -> None:
    batch = random_rows(3, num_rows=9)
    # all equal in the first rows: a tie must not depend on who holds it
    tied = batch["rows"] < 3
    batch["advantages"][tied], batch["old_logprobs"][tied] = 2.0, -0.01
    whole = prepared(name, batch)
    shares = [list(range(rank, 9, ranks))[: 0 if rank == 3 else None] for rank in range(ranks)]
    shares[0] += [row for row in range(9) if not any(row in share for share in shares)]
    parts = [pick_rows(batch, share) for share in shares]
    found = on_ranks(ranks, lambda rank, collective: prepared(name, parts[rank][0], collective))
    for (_, where), own in zip(parts, found, strict=True):
        for key, values in own.items():
            assert torch.equal(values, whole[key][where])


@every_loss
def test_no_tokens(name: str) -> None:
    empty, _ = pick_rows(random_rows(0), [])
    found = evaluate(name, empty)
    assert found.tokens.shape == (0,)
    assert {key: (float(a), int(b)) for key, (a, b) in found.sums.items()} == dict.fromkeys(found.sums, (0.0, 0))
    assert all(float(value) == 0 for value in found.maxima.values())
    assert found.sums.keys() == evaluate(name, random_rows(0)).sums.keys()


@every_loss
def test_shapes_that_disagree_are_refused(name: str) -> None:
    batch = random_rows(0)
    size = len(batch["rows"])
    extra = prepared(name, batch)
    for column in ("old_logprobs", "advantages", "mask"):
        with pytest.raises(ValueError, match=rf"\({size},\).*\(1,\)"):
            evaluate(name, batch | {column: batch[column][:1]}, extra)


def test_sequence_losses_declare_their_aggregation() -> None:
    fixed = {name: aggregation_of(POLICY_LOSSES.get(name, where="")) for name in LOSSES}
    assert {name for name, aggregation in fixed.items() if aggregation} == {"gspo", "gmpo"}
    assert fixed["gspo"] == fixed["gmpo"] == "seq-mean-token-mean"


@every_loss
def test_default_options_pass_the_check(name: str) -> None:
    assert check_loss(name, {}) is POLICY_LOSSES.get(name, where="")


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("ppo_clip", {"clip_low": -0.1}, "clip_low"), ("ppo_clip", {"dual_clip": 1.0}, "dual_clip"),
        ("ppo_clip", {"clip_lo": 0.1}, "clip_lo"), ("ppo_clip", {"clip_low": "0.1"}, "clip_low"),
        ("dapo", {"clip_high": -1.0}, "clip_high"), ("gspo", {"clip_high": float("nan")}, "clip_high"),
        ("gspo", {"rows": 3}, "rows"), ("gmpo", {"clip_low": -1.0}, "clip_low"),
        ("cispo", {"cap": "absolute", "clip_low": 0.2}, "clip_low"), ("cispo", {"cap": "none"}, "cap"),
        ("cispo", {"cap": "absolute", "clip_high": 0.0}, "clip_high"), ("sapo", {"tau_positive": 0.0}, "tau_positive"),
        ("dppo_tv", {"kl_tau": -1.0}, "kl_tau"), ("dppo_tv", {"ratio_cap": 0.0}, "ratio_cap"),
        ("decoupled_ppo", {"weight_cap": 0.0}, "weight_cap"), ("clip_cov", {"cov_ratio": 0.0}, "cov_ratio"),
        ("clip_cov", {"cov_low": 5.0}, "cov_low"), ("kl_cov", {"kl_coef": -1.0}, "kl_coef"),
        ("kl_cov", {"prepared": {}}, "prepared"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_a_run(name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_loss(name, options)
    assert caught.value.where == f"algorithm.loss_options.{key}"


def test_a_loss_of_ones_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policy_losses.py").write_text(
        "from rlsys.algorithms.losses import PolicyLoss\n"
        "from rlsys.config.plugins import reads\n"
        "def needy(logprobs, old_logprobs, advantages, mask, *, strength: float):\n"
        "    return PolicyLoss(-strength * advantages * logprobs)\n"
        "@reads('weather')\n"
        "def greedy(logprobs, old_logprobs, advantages, mask, *, weather):\n"
        "    return PolicyLoss(logprobs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert callable(check_loss("my_policy_losses.needy", {"strength": 2.0}))
    with pytest.raises(UserError, match="needs the option 'strength'"):
        check_loss("my_policy_losses.needy", {})
    with pytest.raises(UserError, match="'weather'"):
        check_loss("my_policy_losses:greedy", {})


def test_sequence_losses_are_normalised_by_rows() -> None:
    """Every token of a row carries the row's loss: the mean over tokens and rows is the mean over rows."""
    batch = random_rows(5)
    found = evaluate("gmpo", batch)
    rows = normaliser("seq-mean-token-mean", batch["mask"], batch["rows"], batch["num_rows"])
    by_row = [found.tokens[batch["mask"] & (batch["rows"] == row)] for row in range(batch["num_rows"])]
    live = [tokens for tokens in by_row if len(tokens)]
    assert rows == len(live)
    assert all((tokens == tokens[0]).all() for tokens in live)
    torch.testing.assert_close(aggregate(found, batch), torch.stack([tokens[0] for tokens in live]).sum())
