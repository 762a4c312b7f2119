"""Channels and their composition: verl's composed actor loss, invariance to the cut, switched-off channels."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.channels import CrossEntropy, PolicyGradient
from rlsys.algorithms.objective import ForwardOutput, Objective, ResponseBatch, TeacherOutput
from rlsys.config.errors import UserError
from rlsys.config.schema import AlgorithmConfig, KLConfig

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def make_batch(seed: int, lengths: tuple[int, ...] = (4, 1, 6, 3)) -> tuple[ResponseBatch, ForwardOutput]:
    generator = torch.Generator().manual_seed(seed)
    tokens, rows = sum(lengths), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = torch.rand(tokens, generator=generator) < 0.8
    mask[0] = True
    logprobs = -3 * torch.rand(tokens, generator=generator)
    noisy = [logprobs + 0.3 * torch.randn(tokens, generator=generator) for _ in range(2)]
    advantages = torch.randn(len(lengths), generator=generator)[rows] * mask
    columns = {"response_mask": mask, "advantages": advantages, "old_logprobs": noisy[0], "ref_logprobs": noisy[1]}
    entropy = torch.rand(tokens, generator=generator)
    output = ForwardOutput((logprobs * mask).requires_grad_(), (entropy * mask).requires_grad_())
    return ResponseBatch(columns, rows, len(lengths)), output


def part(batch: ResponseBatch, output: ForwardOutput, start: int, stop: int) -> tuple[ResponseBatch, ForwardOutput]:
    inside = (batch.rows >= start) & (batch.rows < stop)
    columns = {name: column[inside] for name, column in batch.columns.items()}
    cut = ResponseBatch(columns, batch.rows[inside] - start, stop - start)
    return cut, ForwardOutput(output.logprobs[inside], output.entropy[inside])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_composed_loss_matches_verl(aggregation: str, seed: int) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    actor = pytest.importorskip("verl.workers.config.actor")
    lengths, horizon = (4, 1, 6, 3), 6
    batch, output = make_batch(seed, lengths)
    column = torch.cat([torch.arange(n) for n in lengths])

    def dense(flat: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(lengths), horizon, dtype=flat.dtype).index_put((batch.rows, column), flat)

    mask = dense(batch.columns["response_mask"]).float()
    config = actor.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=1e9)
    columns = {name: dense(value) for name, value in batch.columns.items()}
    logprobs = dense(output.logprobs)
    policy, _ = core_algos.compute_policy_loss_vanilla(
        columns["old_logprobs"], logprobs, columns["advantages"], mask, aggregation, config
    )
    kl = core_algos.agg_loss(core_algos.kl_penalty(logprobs, columns["ref_logprobs"], "k3"), mask, aggregation)
    entropy = core_algos.agg_loss(dense(output.entropy), mask, aggregation)
    theirs = policy - 0.01 * entropy + 0.1 * kl

    channel = PolicyGradient(
        aggregation=aggregation,  # type: ignore[arg-type]
        horizon=horizon,
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    objective = Objective({"policy": (channel, 1.0)})
    ours = objective.loss(batch, output, objective.prepare(batch)).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    leaves = [output.logprobs, output.entropy]
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@given(st.integers(0, 500), st.lists(st.integers(0, 4), max_size=3), st.sampled_from(AGGREGATIONS))
def test_any_cut_gives_the_same_loss_gradient_and_metrics(seed: int, cuts: list[int], aggregation: Any) -> None:
    batch, output = make_batch(seed)
    channels = {
        "policy": (PolicyGradient(aggregation=aggregation, horizon=6, kl_coef=0.1, entropy_coef=0.01), 1.0),
        "imitation": (CrossEntropy(), 0.3),
    }
    objective = Objective(channels)
    prepared = objective.prepare(batch)
    whole = objective.loss(batch, output, prepared)
    leaves = [output.logprobs, output.entropy]
    expected = torch.autograd.grad(whole.loss, leaves)
    borders = [0, *sorted(cuts), 4]
    pieces = [
        objective.loss(*part(batch, output, start, stop), prepared) for start, stop in itertools.pairwise(borders)
    ]
    loss = sum((piece.loss for piece in pieces), torch.zeros(()))
    torch.testing.assert_close(loss, whole.loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, pair in whole.sums.items():
        for i in (0, 1):
            added = sum(piece.sums[name][i].double() for piece in pieces)
            torch.testing.assert_close(added, pair[i].double(), rtol=1e-5, atol=1e-5)
    assert all(piece.sums.keys() == whole.sums.keys() for piece in pieces)
    assert all(piece.maxima.keys() == whole.maxima.keys() for piece in pieces)


def test_pi_old_of_itself_has_the_gradient_of_the_column() -> None:
    batch, output = make_batch(1)
    column = PolicyGradient()
    same = ResponseBatch({**batch.columns, "old_logprobs": output.logprobs.detach()}, batch.rows, batch.num_rows)
    expected = torch.autograd.grad(column.loss(same, output).loss_sum, output.logprobs)[0]
    itself = PolicyGradient(old_logprobs="self")
    del batch.columns["old_logprobs"]
    result = itself.loss(batch, output)
    torch.testing.assert_close(torch.autograd.grad(result.loss_sum, output.logprobs)[0], expected, rtol=0, atol=0)
    assert "old_logprobs" not in itself.reads
    assert "old_logprobs" in column.reads


def test_a_missing_pi_old_is_no_silent_fallback() -> None:
    batch, output = make_batch(1)
    del batch.columns["old_logprobs"]
    with pytest.raises(KeyError, match="old_logprobs"):
        PolicyGradient().loss(batch, output)


def test_channels_read_what_they_use() -> None:
    assert PolicyGradient().reads == ("response_mask", "advantages", "old_logprobs")
    assert "ref_logprobs" in PolicyGradient(kl_coef=0.1).reads
    assert not PolicyGradient().entropy_gradient
    assert PolicyGradient(entropy_coef=0.1).entropy_gradient
    both = Objective({"a": (PolicyGradient(), 1.0), "b": (CrossEntropy(), 1.0)})
    assert both.reads == ("response_mask", "advantages", "old_logprobs")


def test_a_channel_of_weight_zero_is_not_computed() -> None:
    batch, output = make_batch(1)
    objective = Objective({"policy": (PolicyGradient(kl_coef=1.0), 0.0), "imitation": (CrossEntropy(), 2.0)})
    assert objective.reads == ("response_mask",)
    result = objective.loss(batch, output, objective.prepare(batch))
    assert set(result.totals) == {"loss", "imitation/loss", "imitation/tokens"}
    torch.testing.assert_close(result.loss, 2 * result.totals["imitation/loss"])
    with pytest.raises(ValueError, match="needs a channel"):
        Objective({})


def test_live_fraction_counts_rows_with_a_sampled_token() -> None:
    batch, output = make_batch(1)
    batch.columns["response_mask"][batch.rows == 2] = False
    value, count = PolicyGradient().loss(batch, output).sums["live_fraction"]
    assert count == 4
    assert value == len(set(batch.rows[batch.columns["response_mask"]].tolist())) < 4


def test_hybrid_advantages_say_how_many_rows_found_a_teacher() -> None:
    """Also where none did: the guard on dead channels looks at it."""
    batch, output = make_batch(1)
    teacher = TeacherOutput(*(torch.zeros_like(output.logprobs) for _ in range(3)))
    output = replace(output, teacher=teacher)
    for rows in ([], [1, 3]):
        taught = torch.isin(batch.rows, torch.tensor(rows, dtype=torch.int64))
        batch.columns["response_mask"][taught] = True
        batch.columns["teacher_mask"] = taught
        value, count = PolicyGradient(hybrid=0.5).loss(batch, output).sums["hybrid/live_fraction"]
        assert (int(value), int(count)) == (len(rows), 4)
    assert "hybrid/live_fraction" not in PolicyGradient().loss(batch, output).sums


def test_nothing_to_learn_anywhere_is_zero_and_not_nan() -> None:
    batch, output = make_batch(1)
    batch.columns["response_mask"][:] = False
    objective = Objective({"policy": (PolicyGradient(kl_coef=0.1), 1.0)})
    result = objective.loss(batch, output, objective.prepare(batch))
    assert result.loss == 0


def test_from_config() -> None:
    config = AlgorithmConfig(
        aggregation="seq-mean-token-sum-norm",
        loss_options={"clip_high": 0.28},
        entropy_coef=0.01,
        kl=KLConfig(coef=0.1),
    )
    channel = PolicyGradient.from_config(config, horizon=64, old_logprobs="self")
    assert (channel.horizon, channel.kl_coef, channel.kl_estimator, channel.entropy_coef) == (64, 0.1, "k3", 0.01)
    in_reward = AlgorithmConfig(kl=KLConfig(coef=0.1, placement="reward"))
    assert PolicyGradient.from_config(in_reward, horizon=64, old_logprobs="column").kl_coef == 0
    with pytest.raises(UserError, match="did you mean 'clip_high'"):
        PolicyGradient(loss_options={"clip_hihg": 0.3})
    with pytest.raises(ValueError, match="horizon"):
        PolicyGradient(aggregation="seq-mean-token-sum-norm")


def test_an_objective_travels_between_processes() -> None:
    objective = Objective({"policy": (PolicyGradient(loss_options={"clip_low": 0.1}, kl_coef=0.1), 1.0)})
    assert pickle.loads(pickle.dumps(objective)) == objective  # noqa: S301
