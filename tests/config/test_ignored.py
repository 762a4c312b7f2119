"""Overrides that the chosen combination would ignore are refused; where something reads them they are not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composing import run_config, with_leaves
from policy_tokens import random_rows

from rlsys.algorithms.collective import Alone
from rlsys.algorithms.losses import POLICY_LOSSES, prepare_of
from rlsys.config.build import cross_check
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored
from rlsys.config.plugins import reads_of
from rlsys.config.schema import RunConfig

Leaves = dict[str, Any]

NO_POLICY: Leaves = {"algorithm.weight": 0.0, "algorithm.distillation.weight": 1.0}
TEACHER: Leaves = {"algorithm.distillation.weight": 0.1, "hints.max_tokens": 64}
HYBRID: Leaves = {"algorithm.distillation.hybrid": 0.9, "hints.max_tokens": 64}
PAIRS: Leaves = {"algorithm.preference.weight": 0.1}
PAIRS_ALONE: Leaves = PAIRS | {"algorithm.weight": 0.0}
TWO: Leaves = {"trainer.updates_per_step": 2}
OWN = "my_module:mine"
CISPO: Leaves = {"algorithm.loss": "cispo"}
PASSK: Leaves = {"algorithm.advantage": "grpo_passk"}
TAID: Leaves = TEACHER | {"algorithm.distillation.divergence": "taid"}
FIXED: Leaves = {"algorithm.distillation.divergence_options.t": 0.5}
LEVEL: Leaves = {
    "algorithm.distillation.divergence_options.t_start": 0.7,
    "algorithm.distillation.divergence_options.t_end": 0.7,
}


def source(*names: str) -> Leaves:
    return TEACHER | {"hints.source": list(names)}


# (what is overridden, where nothing reads it, where something does). Nothing more is set: {}.
CASES: list[tuple[str, Any, Leaves, Leaves]] = [
    ("algorithm.advantage", "rloo", NO_POLICY, {}),
    ("algorithm.advantage_options", {"std": "none"}, NO_POLICY, {}),
    ("algorithm.loss", "cispo", NO_POLICY, {}),
    ("algorithm.loss_options.clip_high", 0.3, {}, TWO),
    ("algorithm.loss_options.clip_high", 0.3, {"algorithm.loss": "decoupled_ppo"}, {"algorithm.loss": OWN}),
    ("algorithm.loss_options.clip_high", 0.3, NO_POLICY | TWO, {"algorithm.old_logprobs": "sampler"}),
    ("algorithm.loss_options", {"clip_high": 0.3}, {}, TWO),
    ("algorithm.loss_options", {"clip_high": 0.3}, {"algorithm.loss": "gspo"}, {"algorithm.loss": "cispo"} | TWO),
    ("algorithm.loss_options", {"cap": "absolute", "clip_high": 3.0}, CISPO, CISPO | TWO),
    ("algorithm.loss_options", {"clip_low": 0.5}, CISPO, CISPO | {"algorithm.old_logprobs": "sampler"}),
    (
        "algorithm.loss_options.clip_high",
        0.5,
        CISPO,
        {"algorithm.loss": "cispo", "algorithm.loss_options": {"cap": "absolute"}},
    ),
    ("algorithm.advantage_options.eps", 0.1, PASSK | {"algorithm.advantage_options.normalize": False}, PASSK),
    ("algorithm.aggregation", "token-sum", NO_POLICY, {}),
    ("algorithm.schedule", [[1.0, 0.5]], NO_POLICY, {}),
    ("algorithm.entropy_coef", 0.1, NO_POLICY, {}),
    ("algorithm.entropy_quantile", 0.8, NO_POLICY, {}),
    ("algorithm.functional_tokens", "x", NO_POLICY, {}),
    ("algorithm.correction.tis_token", {}, NO_POLICY, {}),
    ("algorithm.correction.tis_token.cap", 3.0, NO_POLICY, {}),
    ("algorithm.kl.coef", 0.1, NO_POLICY, {}),
    ("algorithm.kl.corrected", True, {}, {"algorithm.kl.coef": 0.1}),
    (
        "algorithm.kl.target",
        0.1,
        {"algorithm.kl.placement": "reward"},
        {"algorithm.kl.placement": "reward", "algorithm.kl.coef": 0.1},
    ),
    (
        "algorithm.kl.horizon",
        100,
        {"algorithm.kl.placement": "reward", "algorithm.kl.coef": 0.1},
        {"algorithm.kl.placement": "reward", "algorithm.kl.coef": 0.1, "algorithm.kl.target": 0.1},
    ),
    ("algorithm.max_refills", 5, {}, {"algorithm.filters": {"zero_variance": {}}}),
    ("reward.permute", True, NO_POLICY, {}),
    ("algorithm.old_logprobs", "sampler", NO_POLICY | {"algorithm.distillation.ratio_cap": None}, NO_POLICY),
    ("rollout.mismatch_alarm", 0.1, PAIRS_ALONE, NO_POLICY),
    ("trainer.critic.lr", 0.1, {}, {"algorithm.advantage": "gae"}),
    ("trainer.critic.lr", 0.1, NO_POLICY | {"algorithm.advantage": "gae"}, {"algorithm.advantage": "gae"}),
    ("trainer.critic.path", "x", NO_POLICY | {"algorithm.advantage": OWN}, {"algorithm.advantage": OWN}),
    *(
        (f"algorithm.distillation.divergence_options.{option}", 0.5, TAID | off, TAID)
        for option, offs in (
            ("t_start", [FIXED]),
            ("t_end", [FIXED]),
            ("alpha", [FIXED, LEVEL]),
            ("beta", [FIXED, LEVEL, {"algorithm.distillation.divergence_options.alpha": 0}]),
        )
        for off in offs
    ),
    ("trainer.critic.path", "x", {"algorithm.advantage": "rloo"}, {"algorithm.advantage": OWN}),
    ("trainer.critic.warmup_steps", 2, {}, {"algorithm.advantage": "my_module.mine"}),
    ("trainer.critic.value_clip", 0.1, {"algorithm.advantage": "gae"}, {"algorithm.advantage": "gae"} | TWO),
    ("algorithm.distillation.schedule", [[1.0, 0.5]], HYBRID, TEACHER),
    ("algorithm.distillation.divergence", "forward_kl", HYBRID, TEACHER),
    ("algorithm.distillation.divergence_options", {"alpha": 0.2}, HYBRID, TEACHER),
    ("algorithm.distillation.divergence_options.alpha", 0.2, {}, TEACHER),
    ("algorithm.distillation.top_k", 20, {}, TEACHER),
    ("algorithm.distillation.tail", False, TEACHER, TEACHER | {"algorithm.distillation.top_k": 20}),
    ("algorithm.distillation.ratio_cap", 3.0, TEACHER, TEACHER | TWO),
    ("algorithm.distillation.aggregation", "seq-mean-token-mean", {}, TEACHER),
    ("algorithm.distillation.hybrid", 0.5, NO_POLICY, {}),
    ("algorithm.distillation.teacher", "frozen", {}, HYBRID),
    ("algorithm.distillation.teacher_rate", 0.1, TEACHER, TEACHER | {"algorithm.distillation.teacher": "ema"}),
    (
        "algorithm.distillation.teacher_mix",
        0.1,
        TEACHER,
        TEACHER | {"algorithm.distillation.teacher": "trust_region"},
    ),
    ("algorithm.distillation.teacher_path", "x", TEACHER, TEACHER | {"algorithm.distillation.teacher": "model"}),
    ("hints.source", ["hint"], {}, HYBRID),
    ("hints.max_tokens", 64, {}, TEACHER),
    ("hints.threshold", 0.5, source("feedback"), source("feedback", "sibling")),
    ("hints.strip_thinking", False, source("reference"), source("sibling")),
    ("hints.solution_template", "{solution}", source("hint"), source("reference")),
    ("hints.reference_key", "x", source("sibling"), source("sibling", "reference")),
    ("hints.hint_key", "x", source("turn"), source("hint")),
    ("hints.hint_template", "{hint}", source("turn"), source("hint")),
    ("hints.turn_template", "{hint}", source("hint"), source("turn")),
    ("hints.feedback_template", "{feedback}", source("sibling"), source("feedback")),
    ("hints.feedback_with_solution", True, source("sibling"), source("sibling", "feedback")),
    ("hints.feedback_with_solution", True, source("feedback", "turn"), source("feedback", "hint")),
    ("hints.instruction", "Go.", source("turn"), source("turn", "feedback")),
    ("algorithm.preference.schedule", [[1.0, 0.5]], {}, PAIRS),
    ("algorithm.preference.loss", "ipo", {}, PAIRS),
    ("algorithm.preference.loss_options.beta", 0.2, {}, PAIRS),
    ("replay.source", "file", {}, PAIRS),
    ("replay.path", "x", PAIRS, PAIRS | {"replay.source": "file"}),
    ("replay.pairs_per_step", 4, PAIRS, PAIRS | {"replay.source": "agreement"}),
    ("replay.agreement_threshold", 3, PAIRS | {"replay.source": "file"}, PAIRS | {"replay.source": "agreement"}),
    ("replay.min_gap", 0.5, PAIRS | {"replay.source": "file"}, PAIRS),
    ("replay.eval_path", "x", PAIRS | {"eval.every": 0}, PAIRS),
    ("deadlines.reference", 1.0, PAIRS | {"algorithm.preference.loss": "simpo"}, PAIRS),
    ("deadlines.reference", 1.0, {}, {"algorithm.loss": OWN}),
    ("deadlines.reference", 1.0, {}, {"algorithm.kl.coef": 0.1}),
    ("deadlines.reference", 1.0, NO_POLICY | {"algorithm.kl.coef": 0.1}, {"algorithm.kl.coef": 0.1}),
    ("guards.limits.variance", 0.1, {}, {"algorithm.advantage": "gae"}),
    ("guards.limits", {"distance_start": None}, {}, {"algorithm.advantage": OWN}),
    ("guards.limits.variance", 0.1, NO_POLICY | {"algorithm.advantage": "gae"}, {"algorithm.advantage": "gae"}),
    ("guards.limits.kl", 5.0, NO_POLICY | TWO, TWO),
    ("guards.limits.kl", 5.0, {}, {"algorithm.kl.coef": 0.1}),
    ("guards.limits.kl", 5.0, NO_POLICY | {"algorithm.kl.coef": 0.1}, {"algorithm.loss": OWN}),
    ("guards.limits.entropy", None, PAIRS_ALONE, NO_POLICY),
]


@pytest.fixture(scope="module")
def plain() -> RunConfig:
    """The quick start with room for a row's other sequences."""
    return run_config("trainer.micro_batch_tokens=100000")


def configured(plain: RunConfig, leaves: Leaves, key: str, value: Any) -> RunConfig:
    """The configuration as it is built, with an override."""
    config = with_leaves(plain, leaves | {key: value})
    cross_check(config)
    return config


@pytest.mark.parametrize(("key", "value", "off", "on"), CASES, ids=[f"{key}-{n}" for n, (key, *_) in enumerate(CASES)])
def test_an_override_is_refused_where_nothing_reads_it(
    plain: RunConfig, key: str, value: Any, off: Leaves, on: Leaves
) -> None:
    with pytest.raises(UserError, match="no effect") as error:
        refuse_ignored(configured(plain, off, key, value), [key])
    assert error.value.where.startswith(key)
    assert error.value.fix


@pytest.mark.parametrize(("key", "value", "off", "on"), CASES, ids=[f"{key}-{n}" for n, (key, *_) in enumerate(CASES)])
def test_it_counts_where_something_does(plain: RunConfig, key: str, value: Any, off: Leaves, on: Leaves) -> None:
    refuse_ignored(configured(plain, on, key, value), [key])


VALUES = {"cap": "absolute", "clamp": True, "cov_low": 0.2, "cov_high": 1.5}


def options_of(loss: str) -> Iterator[tuple[str, Any]]:
    """Its options, each with a value that is not its default."""
    function = POLICY_LOSSES.get(loss, where="")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in reads_of(function):
            yield name, VALUES.get(name, 1.1 if name in ("dual_clip", "ratio_cap", "weight_cap") else 0.55)


@pytest.mark.parametrize("loss", POLICY_LOSSES.names())
def test_options_without_a_gradient_in_the_first_update_are_those_that_are_refused(plain: RunConfig, loss: str) -> None:
    """With one update a step π is π_old, though not the sampler's μ."""
    batch = random_rows(seed=3, num_rows=200, drift=0.0)
    batch["rollout_logprobs"] = batch["old_logprobs"] + 5 * (batch["rollout_logprobs"] - batch["old_logprobs"])
    function = POLICY_LOSSES.get(loss, where="")

    def gradient(**options: Any) -> torch.Tensor:
        logprobs = batch["logprobs"].clone().requires_grad_()
        prepare = prepare_of(function)
        fixed = (batch["old_logprobs"], batch["advantages"], batch["mask"])
        known = batch | {"prepared": prepare(*fixed, Alone(), **options) if prepare else {}}
        found = function(logprobs, *fixed, **{name: known[name] for name in reads_of(function)}, **options)
        return torch.autograd.grad(found.tokens.sum(), logprobs)[0]

    for option, value in options_of(loss):
        key = f"algorithm.loss_options.{option}"
        config = configured(plain, {"algorithm.loss": loss}, key, value)
        if torch.allclose(gradient(), gradient(**{option: value}), rtol=1e-12, atol=0):
            with pytest.raises(UserError, match="no effect"):
                refuse_ignored(config, [key])
        else:
            refuse_ignored(config, [key])
        refuse_ignored(with_leaves(config, TWO), [key])


def test_what_any_combination_reads_is_never_refused(plain: RunConfig) -> None:
    always = ["algorithm.weight", "algorithm.filters", "guards.every", "guards.limits.length", "guards.dead_steps"]
    for leaves in ({}, NO_POLICY, TEACHER, PAIRS):
        refuse_ignored(with_leaves(plain, leaves), always)
