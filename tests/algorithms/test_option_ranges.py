"""Every numeric option of the algorithms' plug-ins has a range, and what lies outside is refused before a run."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from composing import run_config, with_leaves

from rlsys.algorithms.advantages import ADVANTAGES
from rlsys.algorithms.corrections import CORRECTIONS
from rlsys.algorithms.divergences import DIVERGENCES
from rlsys.algorithms.filters import GROUP_FILTERS
from rlsys.algorithms.losses import POLICY_LOSSES, aggregation_of
from rlsys.algorithms.preferences import PREFERENCE_LOSSES
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads_of
from rlsys.config.schema import RunConfig
from rlsys.controller.trial import try_out

Leaves = dict[str, Any]

# What they bound may itself be negative: a covariance, the mean of rewards.
ANY_SIGN = {("clip_cov", "cov_low"), ("clip_cov", "cov_high"), ("difficulty", "low"), ("difficulty", "high")}
# Shares and probabilities, and how far these move.
AT_MOST_ONE = {
    *(("gae", name) for name in ("gamma", "lam")),
    ("reinforce_plus_plus", "gamma"),
    *((loss, "cov_ratio") for loss in ("clip_cov", "kl_cov")),
    *(("dppo_tv", name) for name in ("mask_low", "mask_high")),
    *((correction, "low") for correction in ("icepop", "sequence_mask", "veto")),
    ("jsd", "alpha"),
    *(("taid", name) for name in ("t", "t_start", "t_end", "alpha", "beta")),
    ("cdpo", "label_smoothing"),
}


def numeric(function: Callable[..., Any]) -> Iterator[str]:
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        kinds = set(typing.get_args(hints.get(name)) or (hints.get(name),))
        given = set(reads_of(function)) - {"t"}  # which is an option of TAID too
        if parameter.kind is parameter.KEYWORD_ONLY and kinds & {float, int} and name not in given:
            yield name


def with_option(kind: str, name: str, option: str, value: float) -> Leaves:
    options = {option: value}
    match kind:
        case "advantage" | "loss":
            aggregation = aggregation_of(POLICY_LOSSES.get(name, where="")) if kind == "loss" else None
            fixed = {"algorithm.aggregation": aggregation} if aggregation else {}
            return {f"algorithm.{kind}": name, f"algorithm.{kind}_options": options} | fixed
        case "correction" | "filters":
            needed = {"threshold": 1.0} if name == "reject" else {}
            return {f"algorithm.{kind}": {name: needed | options}}
        case "divergence":
            distillation = "algorithm.distillation"
            named = {f"{distillation}.divergence": name, f"{distillation}.divergence_options": options}
            return named | {f"{distillation}.weight": 1.0}
    return {
        "algorithm.preference.loss": name,
        "algorithm.preference.loss_options": options,
        "algorithm.preference.weight": 1.0,
    }


REGISTRIES = {
    "advantage": ADVANTAGES,
    "loss": POLICY_LOSSES,
    "correction": CORRECTIONS,
    "filters": GROUP_FILTERS,
    "divergence": DIVERGENCES,
    "preference": PREFERENCE_LOSSES,
}
OPTIONS = [
    (kind, name, option)
    for kind, registry in REGISTRIES.items()
    for name in registry.names()
    for option in numeric(registry.get(name, where=""))
]


@pytest.fixture(scope="module")
def plain() -> RunConfig:
    return run_config("trainer.micro_batch_tokens=100000", "steps=1")


def test_there_are_options_of_every_kind() -> None:
    assert {kind for kind, _, _ in OPTIONS} == set(REGISTRIES)
    assert {(name, option) for _, name, option in OPTIONS} >= ANY_SIGN | AT_MOST_ONE


@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS, ids=["-".join(entry[1:]) for entry in OPTIONS])
def test_an_option_outside_its_range_is_refused(plain: RunConfig, kind: str, name: str, option: str) -> None:
    wrong = [math.nan, math.inf]
    wrong += [] if (name, option) in ANY_SIGN else [-0.5]
    wrong += [1.5] if (name, option) in AT_MOST_ONE else []
    for value in wrong:
        with pytest.raises(UserError) as error:
            try_out(with_leaves(plain, with_option(kind, name, option, value)))
        assert name in f"{error.value.where} {with_option(kind, name, option, value)}"


@pytest.mark.parametrize("name", ["grpo", "gdpo", "grpo_passk"])
def test_equal_rewards_are_not_divided_by_nothing(plain: RunConfig, name: str) -> None:
    """With eps = 0 a group of equal rewards would have 0 / 0."""
    with pytest.raises(UserError, match="greater than 0"):
        try_out(with_leaves(plain, with_option("advantage", name, "eps", 0.0)))
    try_out(with_leaves(plain, with_option("advantage", name, "eps", 1e-12)))
